"""WoodFisher: pruning by second-order information, with the weights that stay making up for those that go."""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from sparsetwin._compat import is_sharded
from sparsetwin.distributions import Distribution, Global, check_budgets
from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Method
from sparsetwin.methods._course import Course
from sparsetwin.methods._inverse_fisher import InverseFisher, Repair
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import budgets_among
from sparsetwin.methods._state import SparseState
from sparsetwin.methods.gmp import check_rising
from sparsetwin.schedules import Phase
from sparsetwin.selection import select_masks


@dataclass(frozen=True, kw_only=True)
class WoodFisher(Method):
    """Prune ever more of a trained network, whose weights that stay are changed at each pruning.

    On entering a sparse phase the inverse of the empirical Fisher matrix is estimated from sampled gradients, in
    blocks. A weight is worth ``w_q ** 2 / (2 * [F^-1]_qq)``. Those worth least are pruned, and the others of their
    block move by ``-F^-1[:, Q] (F^-1[Q, Q])^-1 w[Q]``, Q being all that is pruned in it. None grows again.

    Raises:
        ConfigError: If a field has a value that is none of its own.
        ScheduleError: If the sparsity falls somewhere, or is 0 throughout.

    Source: Singh & Alistarh, 2020, arXiv 2004.14340, sections 3 and 4; Hassibi & Stork, 1992, for the change of the
        weights that stay.
    """

    course: ClassVar[Course] = Course(kind="gradual", start=0.0, stop=0.6, every=0.1)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("method.options.samples", (64, 160)),
        Knob("schedule.stop", (0.4, 0.6), "run"),
    )

    distribution: Distribution = Global()
    """`Global` ranks all layers together; `Uniform`, `ERK` and `PerLayer` give each layer its own sparsity."""
    minimum_kept: int = 1
    """Weights that every layer keeps, taken out of the global budget."""
    samples: int = 400
    """Gradients, each of one sample batch, that the Fisher matrix is estimated from at each pruning."""
    block_size: int = 50
    """Neighbouring weights of a layer whose interactions count; memory is the number of weights times this."""
    damping: float = 1e-5
    """Added to the diagonal of the Fisher matrix."""
    repair: Repair = "joint"
    """How the weights that stay make up for the pruned ones: for all of a block jointly, summed, or none."""

    def __post_init__(self) -> None:
        check_rising(self.schedule, who="WoodFisher")
        if not isinstance(self.distribution, Distribution):
            raise ConfigError(f"expected a distribution such as Global() or Uniform(), got {self.distribution!r}")
        for name in ("minimum_kept", "samples", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 1e-30 <= self.damping < float("inf"):  # its inverse has to be a number in fp32
            raise ConfigError(f"damping needs to be finite and at least 1e-30, got {self.damping}")
        if self.repair not in get_args(Repair):
            raise ConfigError(f"repair is one of {', '.join(get_args(Repair))}, got {self.repair!r}")

    def check(self, state: SparseState) -> None:
        """Refuse sharded weights, and a sparsity at which some layer could keep nothing.

        Raises:
            UsageError: If a weight is a DTensor, whose blocks may lie in several processes.
            SelectionError: If the budget of a phase is smaller than the layers' minimum.
        """
        sharded = next((name for name, weight in state.weights.items() if is_sharded(weight)), None)
        if sharded is not None:
            raise UsageError(
                f"{sharded} is sharded, and WoodFisher needs the whole gradient of a layer; use "
                "DistributedDataParallel, or another method"
            )
        for sparsity in sorted({phase.sparsity for phase in self.schedule.phases if phase.is_sparse}):
            budgets = self.distribution.budgets(state.shapes, sparsity)
            check_budgets(budgets, state.sizes, minimum_kept=self.minimum_kept)

    def gradient_samples(self, phase: Phase) -> int:
        """Return ``samples`` where a sparse phase begins."""
        return self.samples if phase.is_sparse else 0

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of the weights worth most, of those that are left, and let these make up for the others."""
        if not phase.is_sparse:
            return {}
        inverses = self._inverses(state)
        masks = select_masks(
            state.weights,
            lambda name: _saliency(state, name, inverses[name]),
            budgets_among(self.distribution.budgets(state.shapes, phase.sparsity), state.masks),
            minimum_kept=self.minimum_kept,
        )
        for name, weight in state.weights.items():
            pruned = state.masks[name] & ~masks[name] if state.masks else ~masks[name]
            weight.add_(inverses.pop(name).change(weight, pruned, repair=self.repair))
        return masks

    def _inverses(self, state: SparseState) -> dict[str, InverseFisher]:
        """Return the inverse of every layer. Pruned weights are no longer variables, so their gradients are zero."""
        inverses = {
            name: InverseFisher(weight, samples=self.samples, block_size=self.block_size, damping=self.damping)
            for name, weight in state.weights.items()
        }
        for gradients in state.sample_gradients(self.samples):
            for name, gradient in gradients.items():
                inverses[name].add_(torch.where(state.masks[name], gradient, 0) if state.masks else gradient)
        for name, inverse in inverses.items():
            inverse.check(name)
        return inverses


def _saliency(state: SparseState, name: str, inverse: InverseFisher) -> torch.Tensor:
    """Return what each weight is worth; those that were pruned before are worth less than any."""
    saliency = inverse.saliency(state.weights[name])
    return torch.where(state.masks[name], saliency, -torch.inf) if state.masks else saliency
