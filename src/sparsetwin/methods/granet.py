"""GraNet: gradual pruning with zero-cost neuroregeneration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsetwin._compat import total
from sparsetwin.distributions import ERK, Distribution, Global, check_budgets
from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._drop_and_grow import DropAndGrowMethod, drop_and_grow, random_masks
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase
from sparsetwin.scores import magnitude
from sparsetwin.selection import select_masks


@dataclass(frozen=True, kw_only=True)
class GraNet(DropAndGrowMethod):
    """Prune ever more, and after each pruning drop a fraction of what is kept and grow as many by gradient.

    Raises:
        ScheduleError: If no phase is sparse, or the sparsity falls.
        ConfigError: If a field has a value that is none of its own.

    Source: Liu et al., 2021, arXiv 2106.10404, section 4; its published code for what the paper leaves open.
    """

    course: ClassVar[Course] = Course(kind="gradual", start=0.0, stop=0.5, every=0.01, goes_on=True)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("schedule.stop", (0.5, 0.7), "run"),
        Knob("schedule.initial_sparsity", (0.0, 0.5)),
    )

    distribution: Distribution = Global()
    """What a pruning ranks: all layers together, or each by itself with `Uniform`, `ERK` or `PerLayer`."""
    initial_distribution: Distribution = ERK()
    """Of the random first masks, where the first phase is sparse."""
    drop_fraction: float = 0.5
    """Fraction of a layer's kept weights that the first update drops and grows, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.initial_distribution, Distribution):
            raise ConfigError(f"expected a distribution such as ERK() or Uniform(), got {self.initial_distribution!r}")
        sparsities = [phase.sparsity for phase in self.schedule.phases]
        if sparsities != sorted(sparsities) or not self.schedule.final_sparsity:
            raise ScheduleError(
                f"GraNet's sparsity rises, as in schedules.gradual, to one above 0; the phases have {sparsities}"
            )

    @property
    def decay_steps(self) -> int:
        """Until the end of the schedule."""
        return self.schedule.total_steps

    def needs_gradients(self, phase: Phase) -> bool:
        """Whether weights are grown by gradient for the phase: for all sparse ones but the first phase."""
        return phase.is_sparse and phase.index > 0

    def check(self, state: SparseState) -> None:
        """Refuse a sparsity at which some layer could keep nothing.

        Raises:
            SelectionError: If the budget of a phase is smaller than one weight a layer.
        """
        super().check(state)
        if self.schedule.phases[0].is_sparse:
            budgets = self.initial_distribution.budgets(state.shapes, self.schedule.phases[0].sparsity)
            check_budgets(budgets, state.sizes, minimum_kept=1)

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return none in a dense phase, random masks if the first one is sparse, else pruned and regenerated ones."""
        if not phase.is_sparse:
            return {}
        if phase.index == 0:
            return random_masks(state, self.initial_distribution, sparsity=phase.sparsity)
        living = state.masks or {n: torch.ones_like(w, dtype=torch.bool) for n, w in state.weights.items()}
        kept = self._kept(phase, state, living)
        gradients = state.gradients
        return {
            name: drop_and_grow(
                weight,
                living[name],
                grow_score=magnitude(gradients.get(name, torch.zeros_like(weight))),
                fraction=self.fraction_at(state.steps) if name in gradients else 0.0,
                kept=kept[name],
                name=name,
            )
            for name, weight in state.weights.items()
        }

    def _kept(self, phase: Phase, state: SparseState, living: Masks) -> Mapping[str, int]:
        """Return how many weights each layer keeps: after a pruning of all layers together, or of its own."""
        left = self.schedule.phases[phase.index - 1]
        if left.sparsity == phase.sparsity:
            return {name: total(mask.count_nonzero()) for name, mask in living.items()}
        pruned = select_masks(
            state.weights,
            lambda name: torch.where(living[name], magnitude(state.weights[name]), -torch.inf),
            self.distribution.budgets(state.shapes, phase.sparsity),
        )
        return {name: total(mask.count_nonzero()) for name, mask in pruned.items()}
