"""`Sparsifier`: binds a method to weights and an optimizer; all mutable state of sparse training."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetwin._compat import is_capturing, local
from sparsetwin.errors import SparsityWarning, TargetError, UsageError
from sparsetwin.masking import Masks, count_kept, expand_bits, keep_
from sparsetwin.methods import Method, SparseState
from sparsetwin.metrics import LayerSparsity, sparsity_table
from sparsetwin.optimizer_state import restore_initial_state_
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier._hooks import StepHooks, refuse_unsupported
from sparsetwin.sparsifier._state import dump_state, read_state
from sparsetwin.targets import Targets

PhaseEvent = Literal["leave", "enter"]
PhaseCallback = Callable[[PhaseEvent, Phase], None]


class Sparsifier:
    """Keep a model's weights sparse, or dense, as a method's schedule says.

    Weights stay plain parameters. In a sparse phase gradients are masked before each update and weights after it; in a
    dense phase there are no masks and no kernel is launched. One line goes into the training loop::

        sparsifier = Sparsifier(method, model, optimizer)
        for x, y in batches:
            sparsifier.begin_step()                  # before the forward pass
            loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        method: What to do; holds the schedule.
        model: The model as it is trained: wrapped and sharded already, if it is to be.
        optimizer: One, or a sequence; the steps of the last one are counted.
        targets: Which parameters may be pruned; by default every linear and convolution weight.
        seed: For methods that draw.

    Raises:
        TargetError: If a selector matches nothing, a target is frozen or belongs to no optimizer.
        SelectionError: If some phase would leave a layer without weights.
        UsageError: For optimizers and shardings that cannot be served.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        targets: Targets | None = None,
        seed: int = 0,
    ) -> None:
        self.method = method
        self._model = model
        self._targets = targets or Targets()
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        refuse_unsupported(model, optimizers)
        weights = self._targets.resolve(model)
        self._state = SparseState(weights=weights, generator=torch.Generator().manual_seed(seed))
        method.check(self._state)
        self._steps = 0
        self._begun = -1  # the step for which begin_step() was called last
        self._phase: Phase | None = None
        self._pending: Phase | None = None  # to be entered once gradients exist
        self._bits: dict[str, Tensor] = {}  # masks as wide as the weights; kept between phases, since graphs hold them
        self._callbacks: list[PhaseCallback] = []
        self._hooks = StepHooks(optimizers, before=self._before_update, after=self._after_update)
        try:
            self._owned = self._hooks.owners(weights)
        except TargetError:
            self._hooks.remove()
            raise

    # What is so

    @property
    def phase(self) -> Phase | None:
        """The phase in force; None before the first step. At a boundary it is still the phase that just ended."""
        return self._phase

    @property
    def phase_ends(self) -> bool:
        """Whether the step just done was the last of its phase: weights and statistics are this phase's own."""
        return self._phase is not None and self._steps == self._phase.stop and self._begun != self._steps

    @property
    def steps(self) -> int:
        """Optimizer steps done; skipped updates do not count."""
        return self._steps

    @property
    def masks(self) -> Masks:
        """The masks in force by canonical name, True keeps; empty in dense phases."""
        return self._state.masks

    @property
    def target_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that may be pruned, in the model's order."""
        return tuple(self._state.weights)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The targets by canonical name, in the model's order."""
        return self._state.weights

    def sparsity(self) -> float:
        """Return the fraction of target weights that the masks prune; 0 in a dense phase."""
        return 1 - count_kept(self.masks) / sum(self._state.sizes.values()) if self.masks else 0.0

    def report(self) -> list[LayerSparsity]:
        """Return size, kept weights and non-zero weights of each target."""
        return sparsity_table(self._model, self.masks, self.target_names)

    # What a training loop calls

    def begin_step(self) -> None:
        """Enter the phase of the coming step. Call it before each forward pass; calling it again changes nothing."""
        if self._begun == self._steps:
            return
        if self._steps == self.method.schedule.total_steps:
            warnings.warn(
                f"the schedule ended after {self._steps} steps; its last phase holds from here on",
                SparsityWarning,
                stacklevel=2,
            )
        phase = self.method.schedule.at(self._steps)
        self._begun = self._steps
        if phase != self._phase:
            if self.method.needs_gradients:
                self._pending = phase
            else:
                self._enter(phase)

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero now, so that clipping by norm sees only those of kept weights.

        Call it between backward and ``clip_grad_norm_``, after ``scaler.unscale_``. In dense phases it does nothing.
        """
        self._mask_gradients(self._bits_in_force())

    def step_done(self, *, skipped: bool = False) -> None:
        """Do what the hooks do after an update, where none fires: a replayed CUDA graph of the whole step.

        Args:
            skipped: The update did not happen, for example because of an overflow; the step does not count.

        Raises:
            UsageError: If ``begin_step()`` was not called for this step, or a hook has counted it already.
        """
        if self._begun != self._steps:
            raise UsageError("step_done() needs begin_step() before it, and an optimizer step that no hook has counted")
        self._mask_weights(self._bits_in_force())
        self._steps += not skipped

    def on_phase(self, callback: PhaseCallback) -> None:
        """Call ``callback("leave", phase)`` before a phase ends and ``callback("enter", phase)`` once one has begun."""
        self._callbacks.append(callback)

    def detach(self) -> None:
        """Take all hooks off the optimizers. Weights and optimizer state stay as they are."""
        self._hooks.remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return all mutable state as plain data and tensors, for ``torch.save`` and ``torch.load(weights_only=True)``.

        Save after a step, before the next ``begin_step()``.
        """
        return dump_state(self.method, self._state, steps=self._steps, phase=self._phase)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; load the model and the optimizer before.

        Raises:
            StateError: If it is of another method, schedule or model (the differing field is named), or the model's
                pruned weights are not zero, which shows that the model was not loaded first.
        """
        loaded = read_state(state, self.method, self._resolved())
        self._state.masks, self._state.buffers = loaded.masks, loaded.buffers
        if loaded.generator_state is not None:
            self._state.generator.set_state(loaded.generator_state)
        self._steps, self._begun, self._pending = loaded.steps, -1, None
        self._phase = self.method.schedule.phases[loaded.phase] if loaded.phase >= 0 else None
        self._fill_bits()

    def prepare_load(self, steps: int) -> None:
        """Make masks exist as they do after ``steps`` steps, for loaders that fill existing tensors only.

        ``torch.distributed.checkpoint`` reads into the tensors of ``state_dict()``; call this before it is taken.

        Args:
            steps: Optimizer steps done when the checkpoint was saved.
        """
        phase = self.method.schedule.at(max(steps - 1, 0)) if steps else None
        weights = self._resolved()
        is_masked = phase is not None and phase.is_sparse
        self._state.masks = (
            {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()} if is_masked else {}
        )
        self._steps, self._begun, self._phase = steps, -1, phase
        self._fill_bits()

    # How it is done

    def _enter(self, phase: Phase) -> None:
        left = self._phase
        if left is not None:
            self._call_back("leave", left)
        weights = self._resolved()
        with torch.no_grad():
            self._state.masks = self.method.enter(phase, self._state)
        self._phase, self._pending = phase, None
        self._fill_bits()
        self._mask_weights(self._bits_in_force())
        if left is not None:
            self._reset_optimizers(left, phase, weights)
        self._warn_of_thin_layers()
        self._call_back("enter", phase)

    def _resolved(self) -> dict[str, nn.Parameter]:
        """Look the targets up by name again and refuse a model that is no longer the one attached to."""
        weights = self._targets.resolve(self._model)
        if tuple(weights) != self.target_names:
            changed = sorted(set(weights) ^ set(self.target_names))
            raise TargetError(
                f"the targets changed after attaching: {', '.join(changed[:3])}; attach a new Sparsifier to the model"
            )
        self._owned = self._hooks.owners(weights)
        self._state.weights = weights
        return weights

    def _reset_optimizers(self, left: Phase, entered: Phase, weights: Mapping[str, nn.Parameter]) -> None:
        scope = self.method.reset_scope(left, entered)
        if scope == "none":
            return
        for optimizer, names in self._owned.items():
            everything = self._hooks.parameters(optimizer)
            restore_initial_state_(optimizer, everything if scope == "all" else [weights[name] for name in names])

    def _before_update(self, optimizer: Optimizer) -> None:
        if self._begun != self._steps and not is_capturing():
            raise UsageError(
                f"begin_step() was not called before optimizer step {self._steps + 1}; "
                "call sparsifier.begin_step() once before each forward pass"
            )
        if self._pending is not None:
            self._enter(self._pending)
        self._mask_gradients(self._bits_in_force(optimizer))
        self.method.before_update(self._state)

    def _after_update(self, optimizer: Optimizer, skipped: bool) -> None:
        if not skipped:
            self.method.after_update(self._state)
        self._mask_weights(self._bits_in_force(optimizer))
        is_last = optimizer is self._hooks.optimizers[-1]
        if is_last and not skipped and not is_capturing():
            self._steps += 1

    def _fill_bits(self) -> None:
        """Spread the masks to whole words, in the tensors that exist already where they fit."""
        for name, mask in self.masks.items():
            weight = local(self._state.weights[name])
            bits = expand_bits(local(mask), dtype=weight.dtype)
            old = self._bits.get(name)
            if old is not None and old.dtype == bits.dtype and old.device == bits.device and old.shape == bits.shape:
                old.copy_(bits)
            else:
                self._bits[name] = bits

    def _bits_in_force(self, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
        masks = self._state.masks
        if not masks:
            return {}
        names = masks if optimizer is None else self._owned[optimizer]
        return {name: self._bits[name] for name in names if name in masks}

    @torch.no_grad()
    def _mask_gradients(self, bits: Mapping[str, Tensor]) -> None:
        for name, word in bits.items():
            gradient = self._state.weights[name].grad
            if gradient is not None:
                keep_(local(gradient), word)

    @torch.no_grad()
    def _mask_weights(self, bits: Mapping[str, Tensor]) -> None:
        projects = type(self.method).project is not Method.project
        for name, word in bits.items():
            weight = self._state.weights[name]
            if projects:
                weight.copy_(self.method.project(name, weight, self._state.masks[name]))
            else:
                keep_(local(weight), word)

    def _warn_of_thin_layers(self) -> None:
        thin = {
            name: int(mask.sum()) for name, mask in self.masks.items() if mask.ndim > 1 and int(mask.sum()) < len(mask)
        }
        if thin:
            layers = ", ".join(f"{name} ({kept} for {len(self.masks[name])})" for name, kept in list(thin.items())[:5])
            warnings.warn(
                f"{len(thin)} layers keep fewer weights than they have outputs: {layers}", SparsityWarning, stacklevel=3
            )

    def _call_back(self, event: PhaseEvent, phase: Phase) -> None:
        for callback in self._callbacks:
            callback(event, phase)
