"""CrAM: a compression-aware minimizer, whose dense networks can be cut in one shot."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsetwin._compat import are_finite, local
from sparsetwin.distributions import check_budgets
from sparsetwin.errors import ConfigError, ScheduleError, UsageError
from sparsetwin.masking import Masks, apply_masks_
from sparsetwin.methods._base import Pass
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import SparseState
from sparsetwin.patterns import check_pattern
from sparsetwin.schedules import Phase

Gradients = dict[str, Tensor]

_USUAL = (0.5, 0.7, 0.9)
_HIGH = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class CrAM(RankingMethod):
    """Train dense weights whose pruned copies do well too, at every sparsity of a list.

    In a dense phase a step passes twice over its batch. The first pass gives the gradient g at the weights w. The
    second one is at C(w + rho * g): a step up along the gradient, of which the largest target weights are kept, at a
    sparsity drawn anew from that list. The optimizer updates w by the second gradient, and with ``plus`` by the sum of
    both. A sparse phase, at the end, is a cut by magnitude with ordinary training after it.

    Raises:
        ConfigError: If a field has a value that is none of its own.
        ScheduleError: If the first phase is sparse, or the sparsity falls somewhere.

    Source: Peste, Vladu, Kurtic, Lampert & Alistarh, 2023, arXiv 2207.14200, and its published code.
    """

    course: ClassVar[Course] = Course(kind="cut", start=1.0)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("method.options.rho", (0.05, 0.1, 0.2)),
        Knob("method.options.sparse_gradients", (True, False)),
    )

    needs_closure: ClassVar[bool] = True
    rho: float = 0.05
    """Length of the step up, as a multiple of the gradient."""
    sparsities: tuple[float, ...] | None = None
    """Sparsities of the second pass, drawn with equal chances; None is `drawn_sparsities` by the schedule."""
    plus: bool = True
    """Whether the update is by both gradients, which keeps the dense network accurate."""
    sparse_gradients: bool = True
    """Whether pruned weights get no gradient from the second pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsities is not None:
            if not _are_sparsities(self.sparsities):
                raise ConfigError(f"sparsities needs one or more numbers in [0, 1), got {self.sparsities!r}")
            object.__setattr__(self, "sparsities", tuple(self.sparsities))
        if not 0 <= self.rho < math.inf:
            raise ConfigError(f"rho needs to be a finite number that is not negative, got {self.rho}")
        if self.score != "magnitude":
            raise ConfigError(f"CrAM compresses by magnitude, so score is 'magnitude'; got {self.score!r}")
        phases = self.schedule.phases
        if phases[0].is_sparse or any(after.sparsity < before.sparsity for before, after in pairwise(phases)):
            raise ScheduleError(
                "CrAM trains dense and is cut at the end: a dense phase, and then perhaps sparse ones of rising "
                f"sparsity; got {phases}"
            )

    @property
    def drawn_sparsities(self) -> tuple[float, ...]:
        """The sparsities that are drawn from: those given, or the published ones for the schedule's final sparsity.

        >>> from sparsetwin import schedules
        >>> for sparsity in (0.9, 0.95, 0.98):
        ...     CrAM(schedule=schedules.phases([(9, 0.0), (1, sparsity)])).drawn_sparsities
        (0.5, 0.7, 0.9)
        (0.5, 0.7, 0.8, 0.9, 0.95)
        (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)

        Up to 90%, and for a dense schedule, they are those of ResNet-50 on ImageNet; above it those of the runs on
        CIFAR-10 for high sparsities. A final sparsity above 95%, for which nothing was published, is added.

        Source: its published code, configs/imagenet_resnet50_cram_plus_multi_spgrad.yaml and
        configs/cifar10_resnet20_cram_plus_multi_highsp_spgrad.yaml.
        """
        if self.sparsities is not None:
            return self.sparsities
        final = max(phase.sparsity for phase in self.schedule.phases)
        if final <= _USUAL[-1]:
            return _USUAL
        return _HIGH if final <= _HIGH[-1] else (*_HIGH, final)

    def config(self) -> dict[str, Any]:
        """Return the method as plain data, with the sparsities that are drawn from."""
        return {**super().config(), "sparsities": list(self.drawn_sparsities)}

    @property
    def draws(self) -> bool:
        """Whether sparsities are drawn: always."""
        return True

    def check(self, state: SparseState) -> None:
        """Refuse a sparsity, of a phase or of the second pass, at which some layer could keep nothing.

        Raises:
            SelectionError: If the budget is smaller than the layers' minimum.
        """
        super().check(state)
        for sparsity in set(self.drawn_sparsities) - {0.0}:
            check_pattern(self.pattern, state.shapes, sparsity)
            budgets = self.distribution.budgets(state.shapes, sparsity)
            check_budgets(budgets, state.sizes, minimum_kept=self.minimum_kept)

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of the largest weights in a sparse phase, none in a dense one."""
        return self.best(phase, state, among=state.masks) if phase.is_sparse else {}

    def backward(self, closure: Callable[[], Tensor], state: SparseState) -> Tensor:
        """Pass twice over the batch, and leave weights and batch-norm statistics as the first pass left them.

        Args:
            closure: Runs forward and backward over the whole batch of a step, and returns the loss.
            state: Weights, masks, gradients and generator.

        Returns:
            The loss at the weights themselves.

        Raises:
            UsageError: If gradients were there before.
        """
        if state.masks:
            return closure()
        _refuse_gradients(state)
        loss = closure()
        with torch.no_grad():
            first = {name: gradient.clone() for name, gradient in _gradients(state).items()}
            if state.gradient_scale is not None and not are_finite(first.values()):
                return loss  # it overflowed, and the scaler will skip the update
            masks = self._pass_again(closure, state, first)
            self._combine(state, first, masks)
        return loss

    def _pass_again(self, closure: Callable[[], Tensor], state: SparseState, first: Gradients) -> Masks:
        """Leave in ``.grad`` the gradient at the compressed weights, and return the masks of these."""
        parameters = {name: state.parameters[name] for name in first}
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        buffers = [(t, t.clone()) for t in state.tensors.values() if not isinstance(t, nn.Parameter)]
        try:
            for name, parameter in parameters.items():
                parameter.add_(first[name], alpha=self.rho / (state.gradient_scale or 1.0))
                parameter.grad = None
            masks = self._compress_(state)
            with torch.enable_grad():
                closure()
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
            for buffer, value in buffers:
                buffer.copy_(value)
        return masks

    def _compress_(self, state: SparseState) -> Masks:
        sparsities = self.drawn_sparsities
        drawn = sparsities[int(torch.randint(len(sparsities), (), generator=state.generator))]
        if not drawn:
            return {}
        masks = self.best(Phase(0, 0, 1, drawn), state)
        apply_masks_(state.weights, masks)
        return masks

    def _combine(self, state: SparseState, first: Gradients, masks: Masks) -> None:
        second = _gradients(state)
        if self.sparse_gradients:
            apply_masks_(second, {name: mask for name, mask in masks.items() if name in second})
        for name in first if self.plus else ():
            state.parameters[name].grad = second[name].add_(first[name]) if name in second else first[name]

    def passes(self, phase: Phase, *, enters: bool) -> tuple[Pass, ...]:
        """Return two passes in a dense phase; what is expected of the second is the mean of the drawn densities."""
        if phase.is_sparse:
            return (Pass(),)
        density = 1 - fmean(self.drawn_sparsities)
        return (Pass(), Pass(weight_gradient="kept" if self.sparse_gradients else "all", density=density))


def _are_sparsities(given: object) -> bool:
    """Return whether something is a sequence of numbers in [0, 1), and not an empty one."""
    if not isinstance(given, Sequence) or not given:
        return False
    return all(isinstance(sparsity, (int, float)) and 0 <= sparsity < 1 for sparsity in given)


def _gradients(state: SparseState) -> Gradients:
    """Return the gradients of all trained parameters that have one."""
    return {name: p.grad for name, p in state.parameters.items() if p.grad is not None}


def _refuse_gradients(state: SparseState) -> None:
    """Refuse gradients of an earlier batch, by which the weights would have to be moved up too."""
    held = next((name for name, gradient in _gradients(state).items() if bool(local(gradient).any())), None)
    if held is not None:
        raise UsageError(
            f"{held} has a gradient before backward(closure); CrAM moves by the gradient of the whole batch, so let "
            "the closure run over all micro-batches of a step, and call optimizer.zero_grad() after each"
        )
