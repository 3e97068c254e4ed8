"""Schedules of methods other than AC/DC, from the few numbers that a recipe gives."""

from dataclasses import dataclass
from typing import Literal

from sparsetwin.errors import ScheduleError
from sparsetwin.schedules import Schedule, constant, gradual, periodic, phases, rounds

Kind = Literal["alternating", "gradual", "periodic", "constant", "oneshot", "rounds", "cut"]
"""alternating: AC/DC's; gradual: sparsity rises; periodic: one sparsity, masks updated now and then; constant: one
sparsity and one mask; oneshot: dense, then sparse; rounds: train, prune and rewind; cut: dense, sparse at the very
end."""


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


@dataclass(frozen=True, kw_only=True)
class Course:
    """A schedule's kind, with its usual places as fractions of a run."""

    kind: Kind
    start: float = 0.0
    stop: float = 1.0
    every: float = 0.01


COURSES: dict[str, Course] = {
    "acdc": Course(kind="alternating"),
    "dense": Course(kind="constant"),
    "static": Course(kind="constant"),
    "snip": Course(kind="constant"),
    "gmp": Course(kind="gradual", start=0.1, stop=0.75, every=0.02),
    "oneshot": Course(kind="oneshot", start=0.5),
    "imp": Course(kind="rounds", start=0.05),
    "woodfisher": Course(kind="gradual", start=0.0, stop=0.6, every=0.1),
    "set": Course(kind="periodic", stop=1.0, every=0.01),
    "rigl": Course(kind="periodic", stop=0.75, every=0.01),
    "granet": Course(kind="gradual", start=0.0, stop=0.5, every=0.01),
    "topkast": Course(kind="constant"),
    "str": Course(kind="periodic", every=0.8),
    "st3": Course(kind="gradual", start=0.0, stop=0.75, every=0.01),
    "cram": Course(kind="cut", start=0.98),
}
"""The usual course of each method, by its name; a method that is not here has AC/DC's."""

_KINDS: dict[Kind, Course] = {
    course.kind: course
    for course in (COURSES[name] for name in ("acdc", "gmp", "rigl", "static", "oneshot", "imp", "cram"))
}


def usual_course(method: str, kind: Kind | None) -> Course:
    """Return the usual course of a method, or of a kind that is not the method's own."""
    own = COURSES.get(method, COURSES["acdc"])
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
