"""One-shot pruning and fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

from sparsetwin.errors import ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase


@dataclass(frozen=True, kw_only=True)
class OneShot(RankingMethod):
    """Train dense, prune once, train on what is left. With a pre-trained model the sparse phase may be the first.

    Raises:
        ScheduleError: If the schedule is anything but at most one dense phase and one sparse phase.

    Source: Han et al., 2015, arXiv 1506.02626, with one pruning; Hagiwara, 1994, for magnitude.
    """

    course: ClassVar[Course] = Course(kind="oneshot", start=0.5)
    knobs: ClassVar[tuple[Knob, ...]] = (Knob("schedule.start", (0.25, 0.5, 0.7), "run"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = [phase.is_sparse for phase in self.schedule.phases]
        if kinds not in ([True], [False, True]):
            raise ScheduleError(
                "one-shot pruning has a dense phase and then a sparse one, or a sparse one alone, as "
                f"schedules.constant(sparsity=..., total_steps=..., warmup_steps=...) gives; got {self.schedule.phases}"
            )

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of the largest weights."""
        return self.best(phase, state) if phase.is_sparse else {}
