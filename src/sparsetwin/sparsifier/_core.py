"""`Sparsifier`: binds a method to weights and an optimizer; all mutable state of sparse training."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetwin._compat import is_capturing
from sparsetwin.errors import SparsityWarning, TargetError, UsageError
from sparsetwin.masking import Masks, count_kept
from sparsetwin.methods import Method, SparseState
from sparsetwin.metrics import LayerSparsity, sparsity_table
from sparsetwin.optimizer_state import restore_initial_state_
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier._hooks import StepHooks, refuse_unsupported
from sparsetwin.sparsifier._masks import MaskWords, are_finite, check_masks, warn_of_thin_layers
from sparsetwin.sparsifier._state import dump_state, read_state
from sparsetwin.targets import Targets

PhaseEvent = Literal["leave", "enter"]
"""What happens to a phase when its callback is called."""

PhaseCallback = Callable[[PhaseEvent, Phase], None]
"""Called with ``"leave"`` and the phase that ends, then with ``"enter"`` and the phase that has begun."""


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
        model: The model as it is trained: on its device, and wrapped already, if it is to be.
        optimizer: One, or a sequence; the steps of the last one are counted, so it has to step last.
        targets: Which parameters may be pruned; by default every linear and convolution weight.
        seed: For methods that draw.

    Raises:
        TargetError: If a selector matches nothing, a target is frozen or belongs to no optimizer or to two.
        SelectionError: If some phase would leave a layer without weights.
        ConfigError: If the method holds a value that cannot be saved.
        UsageError: For models and optimizers that cannot be served.
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
        if not isinstance(method, Method) or not isinstance(model, nn.Module):
            given = f"{type(method).__name__} and {type(model).__name__}"
            raise UsageError(f"expected a method, a model and an optimizer in this order, got {given} first")
        self.method = method
        self._model = model
        self._targets = targets or Targets()
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        refuse_unsupported(model, optimizers)
        weights = self._targets.resolve(model)
        self._state = SparseState(weights=weights, generator=torch.Generator().manual_seed(seed))
        self._steps = 0
        self._begun = -1  # the step for which begin_step() was called last
        self._phase: Phase | None = None
        self._pending: Phase | None = None  # to be entered once gradients exist
        self._is_loading = (
            False  # between prepare_load() and the next step, where loaders step the optimizer themselves
        )
        self._is_updating = False  # whether an optimizer has updated in this step
        self._words = MaskWords()
        self._callbacks: list[PhaseCallback] = []
        self._hooks = StepHooks(optimizers, before=self._before_update, after=self._after_update)
        self._owned = self._hooks.owners(weights)
        self._check_method()
        self._hooks.attach(weights)

    def _check_method(self) -> None:
        """Refuse now what could only fail in the middle of training."""
        phases = self.method.schedule.phases
        self.method.config()
        self.method.check(self._state)
        if any(self.method.reset_scope(left, entered) != "none" for left, entered in pairwise(phases)):
            for optimizer in self._hooks.optimizers:
                restore_initial_state_(optimizer, [])  # of no parameter: refuses what cannot be restored

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
        """Enter the phase of the coming step. Call it before each forward pass; calling it again changes nothing.

        Raises:
            TargetError: If the targets are no longer those attached to, when a phase begins.
            SelectionError: If no mask can be chosen, for example because a weight is NaN.
            UsageError: After `detach`.
        """
        if self._begun == self._steps:
            return
        if not self._hooks.are_attached:
            raise UsageError("begin_step() was called after detach(); make a new Sparsifier to train on")
        phase = self.method.schedule.at(self._steps)
        self._pending = phase if phase != self._phase else None
        self._is_updating = False
        if self._pending is not None and not self.method.needs_gradients:
            self._enter(self._pending)
        self._begun, self._is_loading = self._steps, False
        if self._steps == self.method.schedule.total_steps:
            warnings.warn(
                f"the schedule ended after {self._steps} steps; its last phase holds from here on",
                SparsityWarning,
                stacklevel=2,
            )

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero now, so that clipping by norm sees only those of kept weights.

        Call it between backward and ``clip_grad_norm_``, after ``scaler.unscale_``. In dense phases it does nothing.
        """
        if self._pending is not None and are_finite(self._state.gradients.values()):
            self._enter(
                self._pending
            )  # a method that needs gradients needs them as they are, neither masked nor clipped
        if self._pending is None:
            self._mask_gradients(self.masks)

    def step_done(self, *, skipped: bool = False) -> None:
        """Do what the hooks do after an update, where none fires: a replayed CUDA graph of the whole step.

        Args:
            skipped: The update did not happen, for example because of an overflow; the step does not count.

        Raises:
            UsageError: If ``begin_step()`` was not called for this step, or a hook has counted it already.
        """
        if self._begun != self._steps:
            raise UsageError("step_done() needs begin_step() before it, and an optimizer step that no hook has counted")
        self._mask_weights(self.masks)
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
        """Load what `state_dict` returned; load the model and the optimizer before. No phase callback is called.

        Raises:
            StateError: If it is of another method, schedule or model (the differing field is named), or the model's
                pruned weights are not zero, which shows that the model was not loaded first. Nothing is changed then.
        """
        loaded = read_state(state, self.method, self._resolved())
        if loaded.generator_state is not None:
            self._state.generator.set_state(loaded.generator_state)
        self._state.buffers = loaded.buffers
        self._continue_from(loaded.steps, loaded.phase, loaded.masks)

    def prepare_load(self, steps: int) -> None:
        """Make masks exist as they do after ``steps`` steps, for loaders that fill existing tensors only.

        ``torch.distributed.checkpoint`` reads into the tensors of ``state_dict()``: call this, take ``state_dict()``,
        let it be filled, and give it to `load_state_dict`. Until then optimizer steps are not counted: such loaders
        make an optimizer's state exist by a step of their own.

        Args:
            steps: Optimizer steps done when the checkpoint was saved.

        Raises:
            ScheduleError: If ``steps`` is negative.
        """
        phase = self.method.schedule.at(steps - 1 if steps > 0 else steps)
        weights = self._resolved()
        is_masked = bool(steps) and phase.is_sparse
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        self._continue_from(steps, phase if steps else None, masks if is_masked else {})
        self._is_loading = True

    # How it is done

    def _continue_from(self, steps: int, phase: Phase | None, masks: Masks) -> None:
        self._steps, self._phase, self._state.masks = steps, phase, masks
        self._begun, self._pending, self._is_updating, self._is_loading = -1, None, False, False
        self._words.fill(masks, self._state.weights)

    def _enter(self, phase: Phase) -> None:
        left = self._phase
        if left is not None:
            self._call_back("leave", left)
        weights = self._resolved()
        with torch.no_grad():
            masks = self.method.enter(phase, self._state)
        check_masks(masks, weights, phase)
        self._state.masks, self._phase, self._pending = masks, phase, None
        self._words.fill(masks, weights)
        self._mask_weights(masks)
        if left is not None:
            self._reset_optimizers(left, phase, weights)
        self._call_back("enter", phase)
        warn_of_thin_layers(masks, stacklevel=3)  # where begin_step() was called

    def _resolved(self) -> dict[str, nn.Parameter]:
        """Look the targets up by name again and refuse a model that is no longer the one attached to."""
        weights = self._targets.resolve(self._model)
        if tuple(weights) != self.target_names:
            changed = sorted(set(weights) ^ set(self.target_names)) or ["their order"]
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

    @torch.no_grad()
    def _before_update(self, optimizer: Optimizer, skips: bool) -> None:
        if self._is_loading:
            return
        if self._begun != self._steps and not is_capturing():
            order = "; of several optimizers the last one given has to step last" if len(self._owned) > 1 else ""
            raise UsageError(
                f"begin_step() was not called before optimizer step {self._steps + 1}; "
                f"call sparsifier.begin_step() once before each forward pass{order}"
            )
        if skips:
            return
        if self._pending is not None:
            self._enter(self._pending)
        has_rule = type(self.method).before_update is not Method.before_update
        if has_rule and not self._is_updating:
            self._mask_gradients(self.masks)  # it may read any gradient
            self.method.before_update(self._state)
        else:
            self._mask_gradients(self._owned[optimizer])
        self._is_updating = True

    @torch.no_grad()
    def _after_update(self, optimizer: Optimizer, skips: bool) -> None:
        if self._is_loading:
            return
        is_last = optimizer is self._hooks.optimizers[-1]
        completes = is_last and not skips and (self._begun == self._steps or is_capturing())
        has_rule = type(self.method).after_update is not Method.after_update
        if has_rule and completes:
            self.method.after_update(self._state)
            self._mask_weights(self.masks)  # it may have changed any weight
        else:
            self._mask_weights(self._owned[optimizer])
        if completes and not is_capturing():
            self._steps += 1

    def _mask_gradients(self, names: Iterable[str]) -> None:
        for name in names if self.masks else ():
            gradient = self._state.weights[name].grad
            if gradient is not None:
                self._words.keep_(gradient, name)

    @torch.no_grad()
    def _mask_weights(self, names: Iterable[str]) -> None:
        projects = type(self.method).project is not Method.project
        for name in names if self.masks else ():
            weight = self._state.weights[name]
            if projects:
                weight.copy_(self.method.project(name, weight, self.masks[name]))
            else:
                self._words.keep_(weight, name)

    def _call_back(self, event: PhaseEvent, phase: Phase) -> None:
        for callback in self._callbacks:
            callback(event, phase)
