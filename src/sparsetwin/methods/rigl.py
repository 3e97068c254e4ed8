"""RigL: rigging the lottery."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._drop_and_grow import (
    DropAndGrowMethod,
    check_one_sparsity,
    drop_and_grow,
    end_of_updates,
    random_masks,
    remember_explored,
)
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase
from sparsetwin.scores import magnitude


@dataclass(frozen=True, kw_only=True)
class RigL(DropAndGrowMethod):
    """Drop the smallest of each layer's kept weights from time to time, and grow where gradients are largest.

    A step in which masks change computes the gradients of all weights and updates none. Weights that are dropped and
    grown at once keep value and momentum; those that were pruned before begin at zero, without momentum.

    Raises:
        ScheduleError: Unless all phases have one sparsity above 0, as those of `schedules.periodic`.
        ConfigError: If a field has a value that is none of its own.

    Source: Evci et al., 2020, arXiv 1911.11134, algorithm 1; its published code for what the paper leaves open.
    """

    course: ClassVar[Course] = Course(kind="periodic", stop=0.75, every=0.01)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("method.options.drop_fraction", (0.1, 0.3, 0.5)),
        Knob("schedule.every", (0.005, 0.01, 0.03), "run"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_sparsity(self)

    @property
    def decay_steps(self) -> int:
        """Until one interval after the last update, T_end in the paper."""
        return end_of_updates(self.schedule)

    def needs_gradients(self, phase: Phase) -> bool:
        """Whether weights are grown by gradient for the phase: for all but the first, whose masks are random."""
        return phase.index > 0

    def skips_update(self, left: Phase | None, entered: Phase) -> bool:
        """Return that a step in which weights are grown updates none."""
        return True

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return random masks at first, then masks in which a fraction has moved to the largest gradients."""
        masks = self._moved(state) if state.masks else random_masks(state, self.distribution, sparsity=phase.sparsity)
        remember_explored(state, masks)
        return masks

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make the memory of the weights that ever lived."""
        remember_explored(state, state.masks)

    def _moved(self, state: SparseState) -> Masks:
        gradients = state.gradients
        return {
            name: drop_and_grow(
                weight,
                state.masks[name],
                grow_score=magnitude(gradients.get(name, torch.zeros_like(weight))),
                fraction=self.fraction_at(state.steps) if name in gradients else 0.0,
                name=name,
            )
            for name, weight in state.weights.items()
        }
