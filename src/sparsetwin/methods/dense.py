"""Plain dense training, so that a baseline runs through the same code."""

from dataclasses import dataclass
from typing import ClassVar

from sparsetwin.errors import ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Method
from sparsetwin.methods._course import Course
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Prune nothing. The schedule may have no sparse phase."""

    course: ClassVar[Course] = Course(kind="constant")

    def __post_init__(self) -> None:
        for phase in self.schedule.phases:
            if phase.is_sparse:
                raise ScheduleError(f"dense training has no sparse phases, got {phase}")

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return no masks."""
        return {}
