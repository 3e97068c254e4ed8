"""The schedule of a recipe: lengths in epochs, fractions or steps, which become steps in this one place."""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NoReturn

from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.methods import Course, Kind
from sparsetwin.recipes._kinds import PLACES, Places, usual_course
from sparsetwin.schedules import Schedule, alternating, check_sparsity, in_steps, paper, phases, ramped

_LENGTHS = ("warmup", "sparse", "dense", "final_dense", "final_sparse")
_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "alternating": ("ramp", "ramp_prunings"),
    "gradual": ("initial_sparsity",),
    "rounds": ("rounds",),
}
"""Fields that one kind uses alone."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Lengths of the phases, in one unit; the schedule is built when the number of steps is known."""

    sparsity: float = 0.9
    """Fraction of the target weights that is zero in sparse phases; explicit phases have their own."""
    paper: str | None = None
    """A published schedule of AC/DC by name, such as imagenet-100, instead of the lengths below; None uses these. A
    method with a usual course of another kind has that, unless kind is alternating."""
    unit: Literal["epochs", "steps", "fractions"] = "epochs"
    """Unit of the lengths."""
    warmup: float = 10
    """Dense start."""
    sparse: float = 20
    """Each sparse phase but the last."""
    dense: float = 20
    """Each dense phase between them."""
    final_dense: float = 20
    """The last dense phase."""
    final_sparse: float = 30
    """The last sparse phase, at least."""
    phases: tuple[tuple[float, float], ...] = ()
    """Explicit phases instead, as pairs of length and sparsity; 0 is dense."""
    ramp: float = 0
    """Length of the ramp with which each sparse phase begins, be it of the lengths above, of a published schedule or
    explicit; 0 prunes at once."""
    ramp_prunings: int = 4
    """Prunings of a ramp."""
    kind: Kind | None = None
    """Which schedule: alternating (the lengths above), gradual, periodic, constant, oneshot, rounds, cut; None is what
    the method usually has. All but the first turn at the places below, whose None is the usual place of the method or,
    where it usually has another kind, of the kind."""
    start: float | None = None
    """Begin of gradual pruning, of one-shot's or a cut's sparse phase; the step that rounds go back to."""
    stop: float | None = None
    """Last pruning of gradual, end of the mask updates of periodic schedules."""
    every: float | None = None
    """Time between prunings of gradual (for granet, of mask updates after them, too), between mask updates of periodic
    schedules; at least one step."""
    initial_sparsity: float = 0.0
    """Sparsity with which a gradual schedule begins."""
    rounds: int = 3
    """Prunings of iterative magnitude pruning."""

    def build(self, *, steps_per_epoch: int, epochs: int, method: str = "acdc") -> Schedule:
        """Return the schedule of a run.

        Args:
            steps_per_epoch: Optimizer steps of one epoch.
            epochs: Length of the run.
            method: Name of the method, which has a usual kind of schedule.

        Raises:
            ScheduleError: If the lengths do not fit the run, or hold no sparse phase; it says what to change.
            ConfigError: If a published schedule and lengths are given at once.
        """
        check_sparsity(self.sparsity)
        course = usual_course(method, self.kind)
        self._check_places(course.kind)
        if self.paper is not None and course.kind == "alternating":
            made = self._published(self.paper, steps_per_epoch=steps_per_epoch, epochs=epochs)
        elif self.phases:
            made = self._explicit(steps_per_epoch=steps_per_epoch, epochs=epochs)
        elif course.kind != "alternating":
            return self._turning(course, steps_per_epoch=steps_per_epoch, epochs=epochs)
        else:
            made = self._alternating(steps_per_epoch=steps_per_epoch, epochs=epochs)
        return self._ramped(made, steps_per_epoch=steps_per_epoch, epochs=epochs) if self.ramp else made

    def check_used(self, method: str) -> None:
        """Refuse what a schedule for one method alone would not use; a comparison shares its schedule among several.

        Raises:
            ConfigError: If a ramp, a sparsity to begin with or a number of rounds would do nothing.
        """
        kind = self.kind_of(method)
        used = ("ramp", "ramp_prunings") if self.phases else _OF_KIND.get(kind, ())
        names = [name for names in _OF_KIND.values() for name in names]
        given = [name for name in names if getattr(self, name) != getattr(ScheduleSettings, name) and name not in used]
        if given:
            self._refuse(given, used=() if self.phases or not PLACES[kind] else (*PLACES[kind], *used), kind=kind)
        if self.ramp_prunings != ScheduleSettings.ramp_prunings and not self.ramp:
            raise ConfigError("--schedule.ramp-prunings is of a ramp, but there is none; add --schedule.ramp LENGTH")

    def check_phases(self, *, is_asked: bool) -> None:
        """Refuse explicit phases beside another sparsity, which would do nothing.

        Args:
            is_asked: Whether the sparsity was asked for; if not, it may be the default.

        Raises:
            ConfigError: If the last sparse phase has another sparsity.
        """
        if not self.phases or (self.sparsity == ScheduleSettings.sparsity and not is_asked):
            return
        final = next((sparsity for _, sparsity in reversed(self.phases) if sparsity), 0.0)
        if self.sparsity != final:
            raise ConfigError(
                f"the phases of --schedule.phases have sparsities of their own, the last {final:g}, so that "
                f"--schedule.sparsity {self.sparsity:g} would do nothing; give one of them"
            )

    def kind_of(self, method: str) -> Kind:
        """Return which kind of schedule a method gets, unless its phases are given one by one."""
        return usual_course(method, self.kind).kind

    def start_of(self, method: str) -> float:
        """Return where a method's usual schedule begins to prune, or what rounds go back to, as a fraction."""
        return usual_course(method, self.kind).start

    def every_of(self, method: str) -> float | None:
        """Return a method's usual time between updates of its masks, as a fraction; None where it has no such time."""
        course = usual_course(method, self.kind)
        return course.every if "every" in PLACES[course.kind] and not self.phases else None

    def _check_places(self, kind: Kind) -> None:
        """Refuse places that would do nothing."""
        used = () if self.phases else PLACES[kind]
        given = [name for name in ("start", "stop", "every") if getattr(self, name) is not None and name not in used]
        if given:
            self._refuse(given, used=used, kind=kind)

    def _refuse(self, given: list[str], *, used: tuple[str, ...], kind: Kind) -> NoReturn:
        what = "explicit phases take" if self.phases else f"a schedule of kind {kind} takes"
        raise ConfigError(f"{what} no {_flags(given)}" + (f"; it has: {_flags(used)}" if used else "; leave it out"))

    def _ramped(self, made: Schedule, *, steps_per_epoch: int, epochs: int) -> Schedule:
        try:
            steps = self._steps(self.ramp, steps_per_epoch, epochs)
            return ramped(made, ramp_steps=steps, prunings=self.ramp_prunings)
        except ScheduleError as error:
            raise ScheduleError(f"--schedule.ramp: {error}") from error

    def _turning(self, course: Course, *, steps_per_epoch: int, epochs: int) -> Schedule:
        total = steps_per_epoch * epochs

        def place(name: str) -> int:
            given: float | None = getattr(self, name)
            if given is None:
                usual: int = round(getattr(course, name) * total)
                return min(usual, total - 1) if name == "start" else max(usual, int(name == "every"))
            exact = given * {"steps": 1, "epochs": steps_per_epoch, "fractions": total}[self.unit]
            if 0 < exact <= 0.5:  # which `in_steps` refuses, but a place may be at the start, and an interval one step
                return int(name == "every")
            return self._steps(given, steps_per_epoch, epochs)

        places = Places(
            total_steps=total,
            start=place("start"),
            stop=place("stop"),
            every=place("every"),
            initial_sparsity=self.initial_sparsity,
            rounds=self.rounds,
            goes_on=course.goes_on,
        )
        return places.build(course.kind, sparsity=self.sparsity)

    def _published(self, name: str, *, steps_per_epoch: int, epochs: int) -> Schedule:
        made = paper(name, sparsity=self.sparsity, steps_per_epoch=steps_per_epoch)
        fixed = [f.name for f in dataclasses.fields(self) if f.name in (*_LENGTHS, "unit", "phases")]
        given = [field for field in fixed if getattr(self, field) != getattr(ScheduleSettings, field)]
        if given:
            raise ConfigError(
                f"the published schedule {name} fixes its lengths, so {_flags(given)} would do nothing; "
                "add --schedule.paper None to give lengths of your own"
            )
        length = made.total_steps // steps_per_epoch
        if length != epochs:
            raise ScheduleError(
                f"the published schedule {name} takes {length} epochs, the run has {epochs}; train for {length} epochs "
                f"(--epochs {length}), or give lengths of your own: --schedule.paper None with {_flags(_LENGTHS)}"
            )
        return made

    def _explicit(self, *, steps_per_epoch: int, epochs: int) -> Schedule:
        run = self._in_unit(steps_per_epoch=steps_per_epoch, epochs=epochs)
        given = sum(length for length, _ in self.phases)
        if not math.isclose(given, run, rel_tol=1e-6):
            raise ScheduleError(
                f"the phases of --schedule.phases add up to {given:g} {self.unit}, the run has {run:g}; "
                "make them equal (--epochs is the length of the run)"
            )
        starts = [sum(length for length, _ in self.phases[:count]) for count in range(len(self.phases))]
        places = [*starts, run]  # the sum of all lengths may miss it by its rounding
        ends = [self._steps(place, steps_per_epoch, epochs) for place in places]
        lengths = [end - start for start, end in pairwise(ends)]
        return phases((steps, sparsity) for steps, (_, sparsity) in zip(lengths, self.phases, strict=True))

    def _alternating(self, *, steps_per_epoch: int, epochs: int) -> Schedule:
        total = steps_per_epoch * epochs
        steps = {}
        for name in _LENGTHS:
            try:
                steps[name] = self._steps(getattr(self, name), steps_per_epoch, epochs)
            except ScheduleError as error:
                raise ScheduleError(f"--schedule.{_dashed(name)}: {error}") from error
            if steps[name] < 1 and name in ("sparse", "dense", "final_dense"):
                raise ScheduleError(
                    f"--schedule.{_dashed(name)} is {getattr(self, name):g} {self.unit}; give it a length"
                )
        middle = total - steps["warmup"] - steps["final_dense"] - steps["final_sparse"]
        if middle < 0:
            raise ScheduleError(self._does_not_fit(steps_per_epoch=steps_per_epoch, epochs=epochs))
        if not steps["final_sparse"] and middle < steps["sparse"]:
            raise ScheduleError(
                f"no sparse phase fits into {epochs} epochs beside the dense ones; give --schedule.final-sparse a "
                "length, or train longer (--epochs)"
            )
        return alternating(
            sparsity=self.sparsity, total_steps=total, **{f"{name}_steps": steps[name] for name in _LENGTHS}
        )

    def _does_not_fit(self, *, steps_per_epoch: int, epochs: int) -> str:
        needed = ("warmup", "final_dense", "final_sparse")
        length = sum(getattr(self, name) for name in needed)
        parts = " + ".join(f"{_dashed(name)} {getattr(self, name):g}" for name in needed)
        run = self._in_unit(steps_per_epoch=steps_per_epoch, epochs=epochs)
        if self.unit == "fractions":
            return f"{parts} = {length:g} of the run, which is more than all of it; shorten them ({_flags(needed)})"
        least = math.ceil(length if self.unit == "epochs" else length / steps_per_epoch)
        return (
            f"{parts} = {length:g} {self.unit} do not fit into a run of {run:g}; train for at least {least} epochs "
            f"(--epochs {least}), or shorten them ({_flags(needed)})"
        )

    def _in_unit(self, *, steps_per_epoch: int, epochs: int) -> float:
        return {"epochs": epochs, "steps": epochs * steps_per_epoch, "fractions": 1}[self.unit]

    def _steps(self, length: float, steps_per_epoch: int, epochs: int) -> int:
        return in_steps(length, self.unit, steps_per_epoch=steps_per_epoch, total_steps=steps_per_epoch * epochs)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _flags(names: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(f"--schedule.{_dashed(name)}" for name in names)
