"""Schedules of methods that prune ever more, or update their masks now and then."""

import math
from itertools import pairwise

from sparsetwin.errors import ScheduleError
from sparsetwin.schedules._phase import Schedule, check_sparsity, check_steps, merged, phases


def gradual(
    *,
    sparsity: float,
    total_steps: int,
    start_step: int,
    stop_step: int,
    every_steps: int,
    initial_sparsity: float = 0.0,
    exponent: float = 3.0,
    final_every_steps: int | None = None,
) -> Schedule:
    """Gradual pruning: sparsity rises along a polynomial, a new phase at every pruning.

    The last pruning is at ``stop_step`` and reaches ``sparsity`` exactly. With ``final_every_steps`` further phases of
    that sparsity follow, for methods such as GraNet, which move their masks whenever a phase begins.

    >>> [round(phase.sparsity, 4) for phase in gradual(sparsity=0.8, total_steps=50, start_step=10, stop_step=30,
    ...                                                every_steps=10).phases]
    [0.0, 0.7, 0.8]
    >>> [phase.start for phase in gradual(sparsity=0.8, total_steps=60, start_step=10, stop_step=30, every_steps=10,
    ...                                   final_every_steps=15).phases]
    [0, 20, 30, 45]

    Args:
        sparsity: Final fraction in [0, 1).
        total_steps: Length of the run in optimizer steps.
        start_step: First step of the ramp; the sparsity there is ``initial_sparsity``.
        stop_step: Last pruning.
        every_steps: Steps between prunings.
        initial_sparsity: Fraction where the ramp starts.
        exponent: 3 is the cubic ramp of the source.
        final_every_steps: Steps between the phases of equal sparsity that follow the last pruning, up to the end; None
            is a single one.

    Raises:
        ScheduleError: If the steps are out of order, or the sparsity would not rise.

    Source: Zhu & Gupta, 2017, arXiv 1710.01878, equation 1.
    """
    check_steps({"start_step": start_step, "stop_step": stop_step, "total_steps": total_steps})
    check_steps({"every_steps": every_steps}, least=1)
    if not start_step < stop_step < total_steps:
        raise ScheduleError(
            f"needs start_step < stop_step < total_steps, got start_step={start_step}, stop_step={stop_step}, "
            f"total_steps={total_steps}"
        )
    if check_sparsity(initial_sparsity) > check_sparsity(sparsity):
        raise ScheduleError(f"initial_sparsity = {initial_sparsity} is more than the final sparsity = {sparsity}")
    if not 0 < exponent < math.inf:
        raise ScheduleError(f"exponent needs to be positive and finite, got {exponent}")
    if final_every_steps is not None:
        check_steps({"final_every_steps": final_every_steps}, least=1)
    prunings = [*range(start_step, stop_step, every_steps), stop_step]
    lengths = [(start_step, 0.0)] if start_step else []
    for step, following in pairwise(prunings):
        left = (1 - (step - start_step) / (stop_step - start_step)) ** exponent
        risen = max(initial_sparsity, sparsity - (sparsity - initial_sparsity) * left)
        lengths.append((following - step, initial_sparsity if step == start_step else risen))
    ends = [*range(stop_step, total_steps, final_every_steps or total_steps), total_steps]
    lengths += [(following - step, sparsity) for step, following in pairwise(ends)]
    return phases(merged(lengths))


def periodic(*, sparsity: float, total_steps: int, every_steps: int, stop_step: int | None = None) -> Schedule:
    """One sparsity, a new phase every ``every_steps``: the schedule of methods that drop and grow weights.

    Args:
        sparsity: Fraction in [0, 1).
        total_steps: Length of the run in optimizer steps.
        every_steps: Steps between mask updates.
        stop_step: No update at or after this step; by default until the end.

    Raises:
        ScheduleError: If ``every_steps`` or ``total_steps`` is less than 1, or ``stop_step`` is negative.

    Source: Evci et al., 2020, arXiv 1911.11134, section 3.
    """
    check_steps({"every_steps": every_steps, "total_steps": total_steps}, least=1)
    stop = total_steps if stop_step is None else stop_step
    check_steps({"stop_step": stop})
    stop = min(stop, total_steps)
    starts = [0, *range(every_steps, stop, every_steps)]
    return phases([(b - a, sparsity) for a, b in zip(starts, [*starts[1:], total_steps], strict=True)])


def rounds(*, sparsity: float, count: int, round_steps: int, rewind_step: int = 0) -> Schedule:
    """Train, prune, go back to ``rewind_step``, train again: the schedule of iterative magnitude pruning.

    Each round prunes the same fraction of the weights that are left, so that the last one reaches ``sparsity``.

    >>> schedule = rounds(sparsity=0.75, count=2, round_steps=100, rewind_step=20)
    >>> [(phase.start, phase.stop, phase.sparsity) for phase in schedule.phases]
    [(0, 20, 0.0), (20, 100, 0.0), (100, 180, 0.5), (180, 260, 0.75)]

    Args:
        sparsity: Final fraction in (0, 1).
        count: Prunings.
        round_steps: Length of the dense training, in optimizer steps.
        rewind_step: Where each round begins again; it is ``round_steps - rewind_step`` long.

    Raises:
        ScheduleError: If a length does not fit.

    Source: Frankle & Carbin, 2019, arXiv 1803.03635; Frankle et al., 2020, arXiv 1912.05671, for ``rewind_step``.
    """
    check_steps({"count": count, "round_steps": round_steps}, least=1)
    check_steps({"rewind_step": rewind_step})
    if rewind_step >= round_steps:
        raise ScheduleError(f"rewind_step = {rewind_step} leaves nothing of round_steps = {round_steps}")
    density = 1 - check_sparsity(sparsity)
    rest = round_steps - rewind_step
    start = [(rewind_step, 0.0)] if rewind_step else []
    pruned = [(rest, 1 - density ** (index / count)) for index in range(1, count)]
    return phases([*start, (rest, 0.0), *pruned, (rest, sparsity)])
