"""Schedules of methods other than AC/DC, from the few numbers that a recipe gives."""

from dataclasses import dataclass

from sparsetwin.errors import ScheduleError
from sparsetwin.methods import METHODS, Course, Kind, Method
from sparsetwin.schedules import Schedule, constant, gradual, periodic, phases, rounds

PLACES: dict[Kind, tuple[str, ...]] = {
    "alternating": (),
    "gradual": ("start", "stop", "every"),
    "periodic": ("stop", "every"),
    "constant": (),
    "oneshot": ("start",),
    "rounds": ("start",),
    "cut": ("start",),
}
"""Fields of the settings at which each kind turns."""


_KINDS: dict[Kind, Course] = {
    course.kind: course
    for course in (METHODS[name].course for name in ("acdc", "gmp", "rigl", "static", "oneshot", "imp", "cram"))
}


def usual_course(method: str, kind: Kind | None) -> Course:
    """Return the usual course of a method, or of a kind that is not the method's own."""
    own = METHODS.get(method, Method).course
    return own if kind in (None, own.kind) else _KINDS[kind]


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a schedule of a kind turns, in optimizer steps."""

    total_steps: int
    start: int
    stop: int
    every: int
    initial_sparsity: float
    rounds: int
    goes_on: bool

    def build(self, kind: Kind, *, sparsity: float) -> Schedule:
        """Return the schedule.

        Raises:
            ScheduleError: If the places are out of order, or the run is too short.
        """
        total = self.total_steps
        if kind == "constant":
            return constant(sparsity=sparsity, total_steps=total)
        if kind == "periodic":
            return periodic(sparsity=sparsity, total_steps=total, every_steps=self.every, stop_step=self.stop)
        if kind == "gradual":
            return gradual(
                sparsity=sparsity,
                total_steps=total,
                start_step=self.start,
                stop_step=min(self.stop, total - 1),
                every_steps=self.every,
                initial_sparsity=self.initial_sparsity,
                final_every_steps=self.every if self.goes_on else None,
            )
        if kind in ("oneshot", "cut"):
            return phases([(self.start, 0.0), (total - self.start, sparsity)] if self.start else [(total, sparsity)])
        return self._rounds(sparsity)

    def _rounds(self, sparsity: float) -> Schedule:
        """Return rounds that fill the run, rewound to the step next to ``start`` at which they come out equal."""
        parts = self.rounds + 1
        first = self.total_steps % parts  # a rewind step that leaves a whole number of steps to every round
        rewind = first + max(0, round((self.start - first) / parts)) * parts
        length = (self.total_steps - rewind) // parts
        if length < 1:
            raise ScheduleError(
                f"{self.total_steps} steps are too few for {self.rounds} rounds after the dense training"
            )
        return rounds(sparsity=sparsity, count=self.rounds, round_steps=rewind + length, rewind_step=rewind)
