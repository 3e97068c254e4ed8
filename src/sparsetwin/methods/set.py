"""SET: sparse evolutionary training."""

from dataclasses import dataclass
from typing import ClassVar

from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._drop_and_grow import (
    Decay,
    DropAndGrowMethod,
    check_one_sparsity,
    draw_seed,
    drop_and_grow,
    end_of_updates,
    random_masks,
    remember_explored,
)
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase
from sparsetwin.scores import random_scores


@dataclass(frozen=True, kw_only=True)
class SET(DropAndGrowMethod):
    """Drop the smallest of each layer's kept weights from time to time, and grow as many at random.

    Raises:
        ScheduleError: Unless all phases have one sparsity above 0, as those of `schedules.periodic`.
        ConfigError: If a field has a value that is none of its own.

    Source: Mocanu et al., 2018, Nature Communications 9, 2383, algorithm 1; by magnitude, as in Evci et al., 2020.
    """

    course: ClassVar[Course] = Course(kind="periodic", stop=1.0, every=0.01)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("method.options.drop_fraction", (0.1, 0.3, 0.5)),
        Knob("schedule.every", (0.005, 0.01, 0.03), "run"),
    )

    decay: Decay = "constant"
    """How the fraction goes on: constant, as in the paper, or half a cosine down to 0 where updates end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_sparsity(self)

    @property
    def decay_steps(self) -> int:
        """Until one interval after the last update."""
        return end_of_updates(self.schedule)

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return random masks at first, then masks in which a fraction has moved to random places."""
        masks = self._moved(state) if state.masks else random_masks(state, self.distribution, sparsity=phase.sparsity)
        remember_explored(state, masks)
        return masks

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make the memory of the weights that ever lived."""
        remember_explored(state, state.masks)

    def _moved(self, state: SparseState) -> Masks:
        return {
            name: drop_and_grow(
                weight,
                state.masks[name],
                grow_score=random_scores(weight, seed=draw_seed(state.generator)),
                fraction=self.fraction_at(state.steps),
                name=name,
            )
            for name, weight in state.weights.items()
        }
