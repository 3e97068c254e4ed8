"""Lengths in epochs or fractions of a run, as steps."""

import math

from sparsetwin.errors import ScheduleError, nearest
from sparsetwin.schedules._phase import check_steps


def in_steps(value: float, unit: str, *, steps_per_epoch: int, total_steps: int) -> int:
    """Convert a length to optimizer steps, rounded to the nearest.

    >>> in_steps(0.25, "fractions", steps_per_epoch=10, total_steps=200)
    50

    Args:
        value: The length.
        unit: ``"steps"``, ``"epochs"`` or ``"fractions"`` (of the run).
        steps_per_epoch: Optimizer steps of one epoch.
        total_steps: Optimizer steps of the run.

    Raises:
        ScheduleError: If the unit is unknown; if the value is negative, not finite, a fraction of more than 1 or not a
            whole number of steps; or if a length that is not zero would be rounded to none.
    """
    check_steps({"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}, least=1)
    factors = {"steps": 1, "epochs": steps_per_epoch, "fractions": total_steps}
    if unit not in factors:
        raise ScheduleError(f"unknown unit {unit!r}; known: {', '.join(factors)}{nearest(unit, factors)}")
    if not math.isfinite(value) or value < 0:
        raise ScheduleError(f"a length is finite and not negative, got {value!r} {unit}")
    if unit == "steps" and value != int(value):
        raise ScheduleError(f"a length in steps is a whole number, got {value!r}")
    if unit == "fractions" and value > 1:
        raise ScheduleError(f"a fraction of the run is at most 1, got {value!r}")
    steps = round(value * factors[unit])
    if value and not steps:
        raise ScheduleError(f"{value!r} {unit} are less than half a step of {factors[unit]}; give it in steps, or 0")
    return steps
