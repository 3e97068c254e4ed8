"""Dense and sparse phases in turn: the schedules of AC/DC, the published ones among them."""

import math
from collections.abc import Sequence

from sparsetwin.errors import ScheduleError, nearest
from sparsetwin.schedules._phase import Phase, Schedule, check_sparsity, check_steps, phases


def alternating(
    *,
    sparsity: float | Sequence[float],
    total_steps: int,
    warmup_steps: int,
    sparse_steps: int,
    dense_steps: int,
    final_dense_steps: int,
    final_sparse_steps: int,
) -> Schedule:
    """AC/DC: a dense warm-up, sparse and dense phases in turn, a longer dense phase, a longer sparse phase.

    What lies between the warm-up and the final dense phase begins and ends with a sparse phase. Steps that do not
    fill a whole dense-sparse pair go to the final sparse phase. If not even one sparse phase fits between them,
    the warm-up and the final dense phase are one.

    Args:
        sparsity: Fraction in [0, 1), or one for each sparse phase.
        total_steps: Length of the run in optimizer steps.
        warmup_steps: Dense steps at the start.
        sparse_steps: Length of each sparse phase between warm-up and final phases.
        dense_steps: Length of each dense phase between them.
        final_dense_steps: Length of the last dense phase.
        final_sparse_steps: Least length of the last sparse phase; 0 ends the run dense, and the steps left over go
            to the final dense phase.

    Raises:
        ScheduleError: If a length is negative, the lengths do not fit into ``total_steps``, no sparse phase fits, or
            ``sparsity`` holds another number of values than there are sparse phases.

    Source: Peste et al., 2021, arXiv 2106.12379, section 3 and the published configurations.
    """
    check_steps({"total_steps": total_steps, "final_dense_steps": final_dense_steps}, least=1)
    check_steps({"sparse_steps": sparse_steps, "dense_steps": dense_steps}, least=1)
    check_steps({"warmup_steps": warmup_steps, "final_sparse_steps": final_sparse_steps})
    middle = total_steps - warmup_steps - final_dense_steps - final_sparse_steps
    if middle < 0:
        raise ScheduleError(
            f"warmup_steps + final_dense_steps + final_sparse_steps = {total_steps - middle} is more than "
            f"total_steps = {total_steps}"
        )
    between: list[tuple[int, bool]] = []  # lengths, and whether they are sparse
    if middle >= sparse_steps:
        pairs = (middle - sparse_steps) // (dense_steps + sparse_steps)
        between = [(sparse_steps, True), *[(dense_steps, False), (sparse_steps, True)] * pairs]
    remainder = middle - sum(steps for steps, _ in between)
    if between:
        lengths = [(warmup_steps, False), *between, (final_dense_steps, False)]
    else:
        lengths = [(warmup_steps + final_dense_steps, False)]
    if final_sparse_steps:
        lengths.append((final_sparse_steps + remainder, True))
    elif between:
        lengths[-1] = (final_dense_steps + remainder, False)
    else:
        raise ScheduleError(
            f"no sparse phase fits: final_sparse_steps is 0, and {middle} of total_steps = {total_steps} are left for "
            f"sparse_steps = {sparse_steps}"
        )
    lengths = [(steps, is_sparse) for steps, is_sparse in lengths if steps]
    values = iter(_per_phase(sparsity, sum(is_sparse for _, is_sparse in lengths)))
    return phases((steps, next(values) if is_sparse else 0.0) for steps, is_sparse in lengths)


def _per_phase(sparsity: float | Sequence[float], count: int) -> list[float]:
    if not isinstance(sparsity, Sequence) or isinstance(sparsity, str):
        return [check_sparsity(sparsity)] * count
    if len(sparsity) != count:
        raise ScheduleError(f"this schedule has {count} sparse phases, got {len(sparsity)} sparsities: {sparsity}")
    return [check_sparsity(value) for value in sparsity]


def acdc_plus_plus(*, sparsity: float, total_steps: int) -> Schedule:
    """AC/DC++: phases that grow with the run, seven sparse ones of a twentieth of it before the last.

    A tenth of the run dense; seven times a twentieth sparse and a twentieth dense, the last dense phase a twentieth
    longer; 15% sparse at the end. A run of 100 epochs has the phases of ``imagenet-100``.

    >>> [phase.start for phase in acdc_plus_plus(sparsity=0.9, total_steps=1000).phases if phase.is_sparse]
    [100, 200, 300, 400, 500, 600, 700, 850]

    Args:
        sparsity: Fraction in [0, 1).
        total_steps: Length of the run in optimizer steps, at least 20.

    Raises:
        ScheduleError: If the run is too short for its phases.

    Source: Kuznedelev et al., 2023, arXiv 2308.02060; layout as in Yasuda et al., 2024 (SequentialAttention++).
    """
    check_steps({"total_steps": total_steps}, least=20)
    ends = [round(total_steps * twentieths / 20) for twentieths in (2, *range(3, 16), 17, 20)]
    return phases(
        (stop - start, sparsity if index % 2 else 0.0)
        for index, (start, stop) in enumerate(zip([0, *ends], ends, strict=False))
    )


def ramped(schedule: Schedule, *, ramp_steps: int, prunings: int, steepness: float = 4.0) -> Schedule:
    """Let the sparsity of each sparse phase rise in several prunings instead of one.

    After the fraction t of the ramp the sparsity is ``s * (1 - exp(-steepness * t)) / (1 - exp(-steepness))``.

    >>> schedule = ramped(phases([(10, 0.0), (10, 0.8)]), ramp_steps=4, prunings=2)
    >>> [(phase.start, round(phase.sparsity, 3)) for phase in schedule.phases]
    [(0, 0.0), (10, 0.705), (14, 0.8)]

    Args:
        schedule: Any schedule; a sparse phase that follows a sparse one is left alone.
        ramp_steps: Steps from the first pruning of a phase to the last, which reaches the phase's sparsity.
        prunings: Prunings in all; 1 is the plain schedule.
        steepness: The larger, the earlier most weights are pruned.

    Raises:
        ScheduleError: If the ramp is longer than a sparse phase, or has more prunings than steps.

    Source: Yasuda et al., 2024 (SequentialAttention++), for AC/DC with blocks.
    """
    check_steps({"prunings": prunings}, least=1)
    check_steps({"ramp_steps": ramp_steps}, least=prunings - 1)
    if not 0 < steepness < math.inf:
        raise ScheduleError(f"steepness needs to be positive and finite, got {steepness}")
    lengths: list[tuple[int, float]] = []
    before: Phase | None = None
    for phase in schedule.phases:
        if not phase.is_sparse or (before is not None and before.is_sparse):
            lengths.append((phase.steps, phase.sparsity))
        elif ramp_steps >= phase.steps:
            raise ScheduleError(
                f"a ramp of {ramp_steps} steps does not fit into a sparse phase of {phase.steps}: {phase}"
            )
        else:
            lengths += _ramp(phase, ramp_steps, prunings, steepness)
        before = phase
    return phases(lengths)


def _ramp(phase: Phase, ramp_steps: int, prunings: int, steepness: float) -> list[tuple[int, float]]:
    starts = [round(ramp_steps * index / max(prunings - 1, 1)) for index in range(prunings)]
    stops = [*starts[1:], phase.steps]
    whole = 1 - math.exp(-steepness)
    risen = [(1 - math.exp(-steepness * (index + 1) / prunings)) / whole for index in range(prunings)]
    values = [*(phase.sparsity * part for part in risen[:-1]), phase.sparsity]
    return [(stop - start, value) for start, stop, value in zip(starts, stops, values, strict=True)]


_PAPER: dict[str, tuple[int, int, int, int, int, int]] = {
    # epochs: total, warm-up, sparse, dense, final dense, final sparse
    "imagenet-100": (100, 10, 5, 5, 10, 15),
    "imagenet-150": (150, 10, 5, 5, 10, 15),
    "imagenet-200": (200, 10, 5, 5, 10, 15),
    "cifar-200": (200, 10, 20, 20, 20, 30),
    "cifar-225": (225, 10, 20, 13, 13, 50),
    "transformer-xl-48": (48, 5, 3, 3, 7, 9),
}
PAPER_NAMES = tuple(_PAPER)
"""Names that `paper` knows."""


def paper(name: str, *, sparsity: float, steps_per_epoch: int) -> Schedule:
    """Return a schedule of the AC/DC paper by name.

    ``imagenet-100``, ``-150`` and ``-200`` (ResNet-50, MobileNetV1), ``cifar-200`` and ``cifar-225`` (WRN-28-10; the
    published configurations call them ``freq20`` and ``dense13``), ``transformer-xl-48``.

    >>> [phase.start for phase in paper("transformer-xl-48", sparsity=0.8, steps_per_epoch=1).phases]
    [0, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 39]

    Args:
        name: One of `PAPER_NAMES`.
        sparsity: Fraction in [0, 1).
        steps_per_epoch: Optimizer steps of one epoch.

    Raises:
        ScheduleError: If the name is unknown.

    Source: Peste et al., 2021, arXiv 2106.12379, and its published configurations.
    """
    if name not in _PAPER:
        raise ScheduleError(f"unknown schedule {name!r}; known: {', '.join(_PAPER)}{nearest(name, _PAPER)}")
    check_steps({"steps_per_epoch": steps_per_epoch}, least=1)
    total, warmup, sparse, dense, final_dense, final_sparse = (n * steps_per_epoch for n in _PAPER[name])
    return alternating(
        sparsity=sparsity,
        total_steps=total,
        warmup_steps=warmup,
        sparse_steps=sparse,
        dense_steps=dense,
        final_dense_steps=final_dense,
        final_sparse_steps=final_sparse,
    )
