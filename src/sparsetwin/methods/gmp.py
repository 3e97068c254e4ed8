"""GMP: gradual magnitude pruning."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from sparsetwin.errors import ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase, Schedule


@dataclass(frozen=True, kw_only=True)
class GMP(RankingMethod):
    """Prune ever more of the smallest weights, and let none grow again.

    Raises:
        ScheduleError: If the sparsity falls somewhere, or is 0 throughout.

    Source: Zhu & Gupta, 2017, arXiv 1710.01878.
    """

    course: ClassVar[Course] = Course(kind="gradual", start=0.1, stop=0.75, every=0.02)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("schedule.start", (0.0, 0.1, 0.3), "run"),
        Knob("schedule.stop", (0.5, 0.7, 0.8), "run"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rising(self.schedule, who="GMP")

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of the largest of the weights that are left."""
        return self.best(phase, state, among=state.masks) if phase.is_sparse else {}


def check_rising(schedule: Schedule, *, who: str) -> None:
    """Refuse a schedule at which weights would have to come back.

    Raises:
        ScheduleError: If the sparsity falls somewhere, or is 0 throughout.
    """
    for before, after in pairwise(schedule.phases):
        if after.sparsity < before.sparsity:
            raise ScheduleError(f"{who} brings no weight back, so sparsity may not fall from {before} to {after}")
    if not schedule.final_sparsity:
        raise ScheduleError(f"{who} needs a sparse phase, such as schedules.gradual(...) has; got dense ones only")
