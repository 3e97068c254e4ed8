"""Static sparse training: masks drawn once, before the first step."""

from dataclasses import dataclass
from typing import ClassVar

from sparsetwin.distributions import ERK, Distribution
from sparsetwin.errors import ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import SparseState
from sparsetwin.schedules import Phase


@dataclass(frozen=True, kw_only=True)
class Static(RankingMethod):
    """Draw masks before the first step and never change them: the baseline of sparse training from scratch.

    Raises:
        ScheduleError: If the schedule has a dense phase, or more than one sparsity.

    Source: Mocanu et al., 2018, arXiv 1707.04780, and Evci et al., 2020, arXiv 1911.11134, as "Static".
    """

    course: ClassVar[Course] = Course(kind="constant")
    knobs: ClassVar[tuple[Knob, ...]] = (Knob("method.distribution", ("erk", "uniform")),)

    distribution: Distribution = ERK()
    """`ERK` keeps small layers denser; `Uniform` gives every layer the same sparsity."""
    score: str = "random"
    """What a weight is worth: drawn at random, or a score such as "magnitude" of the initial weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sparsities = sorted({phase.sparsity for phase in self.schedule.phases})
        if len(sparsities) > 1 or not sparsities[0]:
            raise ScheduleError(
                f"static masks have one sparsity from the first step to the last, got {sparsities}; "
                "use schedules.constant(sparsity=..., total_steps=...)"
            )

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks drawn at the first step."""
        return state.masks or self.best(phase, state)
