"""The schedule of a recipe: lengths in epochs, fractions or steps, which become steps in this one place."""

import dataclasses
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.schedules import Schedule, alternating, check_sparsity, in_steps, paper, phases

_LENGTHS = ("warmup", "sparse", "dense", "final_dense", "final_sparse")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Lengths of the phases, in one unit; the schedule is built when the number of steps is known."""

    sparsity: float = 0.9
    """Fraction of the target weights that is zero in sparse phases."""
    paper: str | None = None
    """A published schedule by name, such as imagenet-100, instead of the lengths below; None uses these."""
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

    def build(self, *, steps_per_epoch: int, epochs: int) -> Schedule:
        """Return the schedule of a run.

        Args:
            steps_per_epoch: Optimizer steps of one epoch.
            epochs: Length of the run.

        Raises:
            ScheduleError: If the lengths do not fit the run, or hold no sparse phase; it says what to change.
            ConfigError: If a published schedule and lengths are given at once.
        """
        check_sparsity(self.sparsity)
        if self.paper is not None:
            return self._published(self.paper, steps_per_epoch=steps_per_epoch, epochs=epochs)
        if self.phases:
            return self._explicit(steps_per_epoch=steps_per_epoch, epochs=epochs)
        return self._alternating(steps_per_epoch=steps_per_epoch, epochs=epochs)

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
        ends = [self._steps(sum(length for length, _ in self.phases[:count]), steps_per_epoch, epochs)
                for count in range(len(self.phases) + 1)]  # fmt: skip
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
