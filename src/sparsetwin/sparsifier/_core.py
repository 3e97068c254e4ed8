"""`Sparsifier`: binds a method to weights and an optimizer; all mutable state of sparse training."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetwin._compat import are_finite, is_capturing, named_tensors
from sparsetwin.errors import SparsityWarning, TargetError, UsageError
from sparsetwin.masking import Masks, count_kept
from sparsetwin.methods import Int8, Method, SparseState
from sparsetwin.metrics import LayerSparsity, sparsity_table
from sparsetwin.schedules import Phase
from sparsetwin.sparsifier._agreement import Agreement, Together
from sparsetwin.sparsifier._hooks import StepHooks, changes_nothing, refuse_unsupported
from sparsetwin.sparsifier._masks import check_masks, warn_of_thin_layers
from sparsetwin.sparsifier._optimizers import begin_learning, check_method, reset_optimizers
from sparsetwin.sparsifier._sampling import GradientPass, sampled_passes
from sparsetwin.sparsifier._state import dump_state, read_state
from sparsetwin.sparsifier._updates import Updates
from sparsetwin.sparsifier._weights import TargetWeights
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
        targets: Which parameters may be pruned; by default every linear and convolution weight, but
            for the exceptions that `Targets` names, which are warned of.
        seed: For methods that draw.
        gradient_pass: For methods that sample gradients on entering a phase: a function that is given 0, 1, 2 ... and
            runs forward and backward on the sample batch of that number, the same one every time.
        group: Processes that train copies of the model, as a process group or a device mesh. A
            ``DistributedDataParallel`` and sharded weights show theirs. All are compared when a phase begins.

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
        gradient_pass: GradientPass | None = None,
        group: Together | None = None,
    ) -> None:
        if not isinstance(method, Method) or not isinstance(model, nn.Module):
            given = f"{type(method).__name__} and {type(model).__name__}"
            raise UsageError(f"expected a method, a model and an optimizer in this order, got {given} first")
        self.method = method
        self._model = model
        self._agreement = Agreement(model, group)
        self._targets = targets or Targets()
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        refuse_unsupported(model, optimizers)
        weights = self._targets.resolve(model)
        self._targets.warn_of_passed_over(model, stacklevel=2)
        self._state = SparseState(
            weights=weights,
            tensors=named_tensors(model),
            generator=torch.Generator().manual_seed(seed),
            groups_of=lambda: self._hooks.groups(self._state.tensors),
        )
        if gradient_pass is not None:
            self._state.gradient_passes = sampled_passes(gradient_pass, lambda: self._state.tensors)
        self._begun = -1  # the step for which begin_step() was called last
        self._pending: Phase | None = None  # to be entered once gradients exist
        self._is_loading = False  # after prepare_load(), until the next step: loaders step the optimizer themselves
        self._passed = -1  # the step for which backward() was called last
        self._held = TargetWeights(method, self._state)
        self._callbacks: list[PhaseCallback] = []
        self._hooks = StepHooks(optimizers, before=self._before_update, after=self._after_update)
        self._updates = Updates(method, self._state, self._held, self._hooks)
        self._owned = self._hooks.owners(weights)
        check_method(method, self._state, self._hooks.optimizers)
        begin_learning(method, self._state, self._hooks.optimizers[-1])
        self._hooks.attach(weights)

    # What is so

    @property
    def phase(self) -> Phase | None:
        """The phase in force; None before the first step. At a boundary it is still the phase that just ended."""
        return self._state.phase

    @property
    def phase_ends(self) -> bool:
        """Whether the step just done was the last of its phase: weights and statistics are this phase's own."""
        phase, steps = self._state.phase, self._state.steps
        return phase is not None and steps == phase.stop and self._begun != steps

    @property
    def awaits_gradients(self) -> bool:
        """Whether a phase begins between this step's backward and its update: no gradient may be masked until then."""
        return self._pending is not None

    @property
    def steps(self) -> int:
        """Optimizer steps done; skipped updates do not count."""
        return self._state.steps

    @property
    def masks(self) -> Masks:
        """The masks in force by canonical name, True keeps; empty in dense phases."""
        return self._state.masks

    @property
    def gradient_masks(self) -> Masks:
        """Masks of the gradients that the optimizer sees, for most methods those in force; empty where it sees all."""
        return self.method.gradient_masks(self._state) if self.masks else {}

    @property
    def target_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that may be pruned, in the model's order."""
        return tuple(self._state.weights)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The targets by canonical name, in the model's order."""
        return self._state.weights

    @property
    def quantization(self) -> Int8 | None:
        """What the weights in the parameters are rounded by, once that has begun; None before, or where nothing is."""
        steps = self._state.steps - (self._begun != self._state.steps)  # of a step that was begun, that one
        return self.method.quantization if self.masks and steps >= self.method.first_quantized else None

    def sparsity(self) -> float:
        """Return the fraction of target weights that the masks prune; 0 in a dense phase."""
        return 1 - count_kept(self.masks) / sum(self._state.sizes.values()) if self.masks else 0.0

    def report(self) -> list[LayerSparsity]:
        """Return size, kept weights and non-zero weights of each target."""
        return sparsity_table(self._model, self.masks, self.target_names)

    # What a training loop calls

    def begin_step(self) -> None:
        """Enter the phase of the coming step. Call it before each forward pass; calling it again changes nothing.

        Only what a GradScaler cut in half, by keeping the last of several optimizers from updating, is settled then.

        Raises:
            TargetError: If the targets are no longer those attached to, when a phase begins.
            SelectionError: If no mask can be chosen, for example because a weight is NaN.
            UsageError: After `detach`.
            AgreementError: If processes that train together differ in what they train or in their masks.
        """
        if self._begun == self._state.steps:
            self._updates.close()
            return
        if not self._hooks.are_attached:
            raise UsageError("begin_step() was called after detach(); make a new Sparsifier to train on")
        phase = self.method.schedule.at(self._state.steps)
        self._pending = phase if phase != self._state.phase else None
        self._updates.begin()
        if self._pending is not None and not self.method.needs_gradients(phase):
            self._enter(self._pending)
        elif self._begun < 0:  # it was loaded
            self._check_agreement()
        self._held.begin_quantizing()
        self._begun, self._is_loading = self._state.steps, False
        if self._state.steps == self.method.schedule.total_steps:
            warnings.warn(
                f"the schedule ended after {self._state.steps} steps; its last phase holds from here on",
                SparsityWarning,
                stacklevel=2,
            )

    def backward(self, closure: Callable[[], Tensor], *, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Run forward and backward as often as the method asks for, which for most methods is once.

        Methods that pass more than once over a batch (CrAM) need it; every other may be used with it. It calls
        `begin_step` itself; the optimizer's step follows.

        Args:
            closure: Computes the loss of the batch, calls its ``backward()`` and returns it.
            scaler: The one with which the closure scales the loss before ``backward()``, if it does.

        Returns:
            What the closure returned, the first time.
        """
        self.begin_step()
        self._state.gradient_scale = None if scaler is None else scaler.get_scale()
        loss = self.method.backward(closure, self._state)
        self._passed = self._state.steps
        return loss

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero now, so that clipping by norm sees only those of kept weights.

        Call it between backward and ``clip_grad_norm_``, after ``scaler.unscale_``. In dense phases it does nothing.
        """
        if self._pending is not None and are_finite(self._state.gradients.values()):
            self._enter(self._pending)  # before anything masks or clips the gradients that the method needs
        if self._pending is None:
            self._held.mask_gradients(self.masks)

    def step_done(self, *, skipped: bool = False) -> None:
        """Do what the hooks do after an update, where none fires: a replayed CUDA graph of the whole step.

        Args:
            skipped: The update did not happen, for example because of an overflow; the step does not count.

        Raises:
            UsageError: If ``begin_step()`` was not called for this step, a hook has counted it already, or the method
                stores or quantizes weights, which a replayed graph would not do.
        """
        method = self.method
        if method.stores_weights or method.needs_closure or method.quantization is not None:
            raise UsageError(f"{type(method).__name__} works on each step in Python and cannot be replayed")
        if self._begun != self._state.steps:
            raise UsageError("step_done() needs begin_step() before it, and an optimizer step that no hook has counted")
        self._held.settle(self.masks)
        self._state.steps += not skipped

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
        return dump_state(self.method, self._state, phase=self._state.phase)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; load the model and the optimizer before. No phase callback is called.

        Tensors may be whole where the model's are sharded (DTensor); each process takes its part.

        Raises:
            StateError: If it is of another method, schedule or model (the differing field is named), or the model's
                pruned weights are not zero, which shows that the model was not loaded first. Nothing is changed then.
        """
        loaded = read_state(state, self.method, self._resolved(), of=self._state)
        if loaded.generator_state is not None:
            self._state.generator.set_state(loaded.generator_state)
        self._state.buffers = loaded.buffers
        with torch.no_grad():
            for name, value in loaded.learned.items():
                self._state.learned[name].copy_(value)  # in place, as the optimizer holds it
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
        self._held.store(done=1)
        if steps:
            self.method.make_buffers(phase, self._state)
        self._is_loading = True

    # How it is done

    def _continue_from(self, steps: int, phase: Phase | None, masks: Masks) -> None:
        self._state.steps, self._state.phase, self._state.masks = steps, phase, masks
        self._begun, self._pending, self._is_loading = -1, None, False
        self._updates.begin()
        self._held.take_masks()

    def _enter(self, phase: Phase) -> None:
        left = self._state.phase
        if left is not None:
            self._call_back("leave", left)
        weights = self._resolved()
        self._agreement.check_position(self.method, steps=self._state.steps, phase=phase, weights=weights)
        self._held.bring_back()
        try:
            masks = self._agreement.choose(lambda: self._chosen(phase), weights, phase=phase, steps=self._state.steps)
        except Exception:
            self._held.settle(self._state.stored)  # as it was, for whoever saves it now
            raise
        old, self._state.masks, self._state.phase, self._pending = self.masks, masks, phase, None
        self._held.take_masks()
        self._held.store()
        self._held.settle(masks)
        if left is not None:
            reset_optimizers(self.method.reset_scope(left, phase), self._hooks, weights, old=old, new=masks)
        self._updates.skips = self.method.needs_gradients(phase) and self.method.skips_update(left, phase)
        self._call_back("enter", phase)
        warn_of_thin_layers(masks, stacklevel=3)  # where begin_step() was called

    @torch.no_grad()
    def _chosen(self, phase: Phase) -> Masks:
        masks = self.method.enter(phase, self._state)
        check_masks(masks, self._state.weights, phase)
        return masks

    def _check_agreement(self) -> None:
        weights, phase, steps = self._state.weights, self._state.phase, self._state.steps
        self._agreement.check_position(self.method, steps=steps, phase=phase, weights=weights)
        self._agreement.check_masks(self.masks, weights, phase=phase, steps=steps)

    def _resolved(self) -> dict[str, nn.Parameter]:
        """Look the targets up by name again and refuse a model that is no longer the one attached to."""
        weights = self._targets.resolve(self._model)
        if tuple(weights) != self.target_names:
            changed = sorted(set(weights) ^ set(self.target_names)) or ["their order"]
            raise TargetError(
                f"the targets changed after attaching: {', '.join(changed[:3])}; attach a new Sparsifier to the model"
            )
        self._owned = self._hooks.owners(weights)
        self._state.weights, self._state.tensors = weights, named_tensors(self._model)
        return weights

    @torch.no_grad()
    def _before_update(self, optimizer: Optimizer, skips: bool) -> None:
        if self._is_loading:
            return
        if self._begun != self._state.steps and not is_capturing():
            if changes_nothing(optimizer):
                return
            order = "; of several optimizers the last one given has to step last" if len(self._owned) > 1 else ""
            raise UsageError(
                f"begin_step() was not called before optimizer step {self._state.steps + 1}; "
                f"call sparsifier.begin_step() once before each forward pass{order}"
            )
        if self.method.needs_closure and self._passed != self._state.steps:
            raise UsageError(
                f"{type(self.method).__name__} passes more than once over a batch; call "
                "sparsifier.backward(closure) in place of begin_step(), forward and backward"
            )
        if self.method.needs_closure and hasattr(optimizer, "grad_scale") and self._state.gradient_scale is None:
            raise UsageError("gradients are scaled by a GradScaler; call sparsifier.backward(closure, scaler=scaler)")
        if skips:
            return
        if self._pending is not None:
            if self._updates.put_off(optimizer, self._owned[optimizer]):
                return
            self._enter(self._pending)
        self._updates.before(optimizer, self._owned[optimizer])

    @torch.no_grad()
    def _after_update(self, optimizer: Optimizer, skips: bool) -> None:
        if self._is_loading:
            return
        counts = not (skips or self._updates.is_put_off) and (self._begun == self._state.steps or is_capturing())
        completes = counts and optimizer is self._hooks.optimizers[-1]
        self._updates.after(optimizer, self._owned[optimizer], counts=counts, completes=completes)
        if completes:
            self._state.steps += not is_capturing()

    def _call_back(self, event: PhaseEvent, phase: Phase) -> None:
        for callback in self._callbacks:
            callback(event, phase)
