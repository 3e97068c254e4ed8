"""IMP: iterative magnitude pruning, with weights or learning rates rewound."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from sparsetwin._compat import local
from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import SparseState
from sparsetwin.methods.gmp import check_rising
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.schedules import Phase

Rewind = Literal["weights", "learning-rate"]
"""What goes back after each pruning: weights and learning rate, or the learning rate alone."""

_REWOUND = "rewound"


@dataclass(frozen=True, kw_only=True)
class IMP(RankingMethod):
    """Train, prune the smallest of the weights left, go back to an early step, and train again, round after round.

    With ``rewind="weights"`` every parameter and buffer goes back to its value at the rewind step, so that the last
    round is a sparse training from there: a lottery ticket. With ``"learning-rate"`` weights go on from where they are.
    Either way the learning-rate schedule of the dense training is repeated from the rewind step on, which
    `learning_rate_step` tells, and optimizers begin anew.

    Raises:
        ScheduleError: If the schedule is not one of rounds of equal length, as `sparsetwin.schedules.rounds` makes.
        ConfigError: If ``rewind`` is none of its values.

    Source: Frankle & Carbin, 2019, arXiv 1803.03635; Frankle et al., 2020, arXiv 1912.05671, algorithm 2, for rewinding
    to a later step; Renda, Frankle & Carbin, 2020, arXiv 2003.02389, for learning rates.
    """

    course: ClassVar[Course] = Course(kind="rounds", start=0.05)
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("schedule.start", (0.01, 0.03, 0.05), "run"),
        Knob("schedule.rounds", (2, 3, 5)),
    )

    rewind: Rewind = "weights"
    """"weights": weights and learning rate go back; "learning-rate": the learning rate alone does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rewind not in get_args(Rewind):
            raise ConfigError(f"rewind is one of {', '.join(get_args(Rewind))}, got {self.rewind!r}")
        check_rising(self.schedule, who="IMP")
        dense = [phase for phase in self.schedule.phases if not phase.is_sparse]
        rounds = {phase.steps for phase in self.schedule.phases if phase.is_sparse} | {dense[-1].steps if dense else 0}
        if len(dense) not in (1, 2) or len(rounds) != 1:
            raise ScheduleError(
                "IMP needs a dense training, perhaps cut in two at the rewind step, and rounds as long as what follows "
                f"that step: use schedules.rounds(...); got {self.schedule.phases}"
            )

    @property
    def rewind_step(self) -> int:
        """Step of the dense training that each round goes back to."""
        return self._last_dense.start

    @property
    def learning_rate_steps(self) -> int:
        """Length of the learning-rate schedule: the dense training's, which each round repeats the end of."""
        return self._last_dense.stop

    def learning_rate_step(self, step: int) -> int:
        """Return the step of the dense training whose learning rate a step has."""
        phase = self.schedule.at(step)
        return step - phase.start + self.rewind_step if phase.is_sparse else step

    @property
    def _last_dense(self) -> Phase:
        return [phase for phase in self.schedule.phases if not phase.is_sparse][-1]

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of a round, after which weights go back; remember them at the rewind step."""
        if not phase.is_sparse:
            if phase == self._last_dense and self.rewind == "weights":
                state.buffers[_REWOUND] = {name: _copy(tensor) for name, tensor in state.tensors.items()}
            return {}
        masks = self.best(phase, state, among=state.masks)
        for name, tensor in state.buffers.get(_REWOUND, {}).items():
            local(state.tensors[name].detach()).copy_(local(tensor))
        return masks

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make what is remembered of the rewind step, and what the score remembers."""
        super().make_buffers(phase, state)
        if self.rewind == "weights" and phase.start >= self.rewind_step:
            state.buffers[_REWOUND] = {name: _copy(tensor) for name, tensor in state.tensors.items()}

    def reset_scope(self, left: Phase, entered: Phase) -> ResetScope:
        """Return "all" where a round begins."""
        return "all" if entered.is_sparse else "none"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
