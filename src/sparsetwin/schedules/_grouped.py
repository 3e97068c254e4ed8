"""Sparsities that groups of m weights can have: the way of a schedule to an N:M pattern."""

import math

from sparsetwin.errors import ScheduleError
from sparsetwin.schedules._phase import Schedule, check_steps, phases


def grouped(schedule: Schedule, *, m: int) -> Schedule:
    """Round the sparsities of a schedule down to multiples of ``1 / m``, which are all that groups of m can have.

    So gradual pruning towards 2:4 keeps 4, 3 and then 2 of every 4 weights: each pruning comes at the first phase that
    asks for that much, and the last one where it was. Phases that become equal to the one before them are one with it.
    A pattern with ``m - n = 1``, such as 1:2, has nothing on the way to it, so it is pruned at once where a ramp ends.

    >>> from sparsetwin.schedules import gradual
    >>> ramp = gradual(sparsity=0.5, total_steps=50, start_step=0, stop_step=40, every_steps=10)
    >>> [(phase.start, round(phase.sparsity, 3)) for phase in ramp.phases]
    [(0, 0.0), (10, 0.289), (20, 0.438), (30, 0.492), (40, 0.5)]
    >>> [(phase.start, phase.sparsity) for phase in grouped(ramp, m=4).phases]
    [(0, 0.0), (10, 0.25), (40, 0.5)]

    Args:
        schedule: Any schedule whose last sparse phase has a multiple of ``1 / m``.
        m: Weights of a group.

    Raises:
        ScheduleError: If ``m`` is no whole number of at least 2, or the last sparse phase would have another sparsity.
    """
    check_steps({"m": m}, least=2)
    final = schedule.final_sparsity
    if not math.isclose(_rounded(final, m), final, rel_tol=0.0, abs_tol=1e-9):
        raise ScheduleError(
            f"groups of {m} weights cannot have the final sparsity of {final!r}; {_rounded(final, m)!r} or another "
            f"multiple of 1/{m} works"
        )
    lengths: list[tuple[int, float]] = []
    before = -1.0
    for phase in schedule.phases:
        rounded = _rounded(phase.sparsity, m)
        if lengths and lengths[-1][1] == rounded and before != phase.sparsity:
            lengths[-1] = (lengths[-1][0] + phase.steps, rounded)
        else:
            lengths.append((phase.steps, rounded))
        before = phase.sparsity
    return phases(lengths)


def _rounded(sparsity: float, m: int) -> float:
    return math.floor(sparsity * m + 1e-9 * m) / m
