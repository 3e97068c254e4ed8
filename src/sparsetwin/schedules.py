"""When a network is dense and when it is sparse: phases as plain numbers, counted in optimizer steps.

The paper's ImageNet run is twelve numbers in four lists of its configuration file; here it is one call
(in epochs; multiply by the steps of an epoch to train with it):

>>> schedule = alternating(sparsity=0.9, total_steps=100, warmup_steps=10, sparse_steps=5, dense_steps=5,
...                        final_dense_steps=10, final_sparse_steps=15)
>>> [phase.start for phase in schedule.phases if phase.is_sparse]   # the eight prunings
[10, 20, 30, 40, 50, 60, 70, 85]
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from sparsetwin.errors import ScheduleError, nearest


@dataclass(frozen=True)
class Phase:
    """Steps ``start`` to ``stop - 1`` of a run, all at one sparsity.

    The paper calls a sparse phase *compressed* and a dense one *decompressed*.
    """

    index: int  # position in its schedule, from 0
    start: int  # first optimizer step
    stop: int  # one past the last optimizer step
    sparsity: float  # fraction of the target weights that is zero, 0 <= sparsity < 1; 0 is a dense phase

    @property
    def is_sparse(self) -> bool:
        """Whether masks are in force."""
        return self.sparsity > 0

    @property
    def steps(self) -> int:
        """Length in optimizer steps."""
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """Phases that follow each other without a gap, from step 0.

    Raises:
        ScheduleError: If there is no phase, a phase is empty, phases leave a gap or overlap, a step is not a whole
            number, or a sparsity is outside [0, 1).
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise ScheduleError("a schedule needs at least one phase, got none")
        step = 0
        for index, phase in enumerate(self.phases):
            check_sparsity(phase.sparsity)
            _check_steps({"start": phase.start, "stop": phase.stop})
            if phase.index != index or phase.start != step:
                raise ScheduleError(f"phase {index} should have index {index} and start at step {step}, got {phase}")
            if phase.stop <= phase.start:
                raise ScheduleError(f"a phase needs at least one step, got {phase}")
            step = phase.stop

    @property
    def total_steps(self) -> int:
        """Length of the whole schedule in optimizer steps."""
        return self.phases[-1].stop

    @property
    def final_sparsity(self) -> float:
        """Sparsity of the last sparse phase, 0 if there is none."""
        return next((phase.sparsity for phase in reversed(self.phases) if phase.is_sparse), 0.0)

    def at(self, step: int) -> Phase:
        """Return the phase of an optimizer step; past the end the last phase holds.

        Args:
            step: Optimizer steps already done, ``step >= 0``.

        Raises:
            ScheduleError: If ``step`` is negative.
        """
        if step < 0:
            raise ScheduleError(f"steps are counted from 0, got {step}")
        index = bisect_right(self.phases, step, key=lambda phase: phase.stop)
        return self.phases[min(index, len(self.phases) - 1)]

    def scaled(self, steps_per_unit: int) -> "Schedule":
        """Return the same schedule with every unit, such as an epoch, ``steps_per_unit`` optimizer steps long.

        Raises:
            ScheduleError: If ``steps_per_unit`` is not a whole number of at least 1.
        """
        _check_steps({"steps_per_unit": steps_per_unit}, least=1)
        return phases((phase.steps * steps_per_unit, phase.sparsity) for phase in self.phases)


def check_sparsity(sparsity: float) -> float:
    """Return ``sparsity`` if it is a fraction that can be asked for.

    Raises:
        ScheduleError: If it is outside [0, 1) or not a number.
    """
    if not isinstance(sparsity, Real):
        raise ScheduleError(f"sparsity is a number, got {sparsity!r}")
    if not 0 <= sparsity < 1:
        hint = f"; for {sparsity:g}% write {sparsity / 100:g}" if 1 < sparsity < 100 else ""
        hint = "; nothing would be left" if sparsity in (1, 100) else hint
        raise ScheduleError(f"sparsity is a fraction of zeros in [0, 1), got {sparsity!r}{hint}")
    return float(sparsity)


def _check_steps(given: Mapping[str, int], *, least: int = 0) -> None:
    for name, value in given.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ScheduleError(f"{name} is a whole number of optimizer steps, got {value!r}")
        if value < least:
            raise ScheduleError(f"{name} needs to be at least {least}, got {value}")


def phases(lengths: Iterable[tuple[int, float]]) -> Schedule:
    """Make a schedule from an explicit list of (steps, sparsity).

    >>> phases([(10, 0.0), (5, 0.9)]).at(12)
    Phase(index=1, start=10, stop=15, sparsity=0.9)

    Args:
        lengths: For each phase its length in optimizer steps and its sparsity; 0 is dense.

    Raises:
        ScheduleError: As `Schedule` does.
    """
    made: list[Phase] = []
    start = 0
    for steps, sparsity in lengths:
        _check_steps({f"the length of phase {len(made)}": steps}, least=1)
        made.append(Phase(len(made), start, start + int(steps), check_sparsity(sparsity)))
        start = made[-1].stop
    return Schedule(tuple(made))


def constant(*, sparsity: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """One sparsity for the whole run, after an optional dense warm-up.

    Args:
        sparsity: Fraction in [0, 1).
        total_steps: Length of the run in optimizer steps.
        warmup_steps: Dense steps before it.

    Raises:
        ScheduleError: If a length is negative, or the warm-up leaves no step.
    """
    _check_steps({"total_steps": total_steps}, least=1)
    _check_steps({"warmup_steps": warmup_steps})
    if warmup_steps >= total_steps:
        raise ScheduleError(f"warmup_steps = {warmup_steps} leaves nothing of total_steps = {total_steps}")
    warmup = [(warmup_steps, 0.0)] if warmup_steps else []
    return phases(_merged([*warmup, (total_steps - warmup_steps, sparsity)]))


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
    _check_steps({"total_steps": total_steps, "final_dense_steps": final_dense_steps}, least=1)
    _check_steps({"sparse_steps": sparse_steps, "dense_steps": dense_steps}, least=1)
    _check_steps({"warmup_steps": warmup_steps, "final_sparse_steps": final_sparse_steps})
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


def gradual(
    *,
    sparsity: float,
    total_steps: int,
    start_step: int,
    stop_step: int,
    every_steps: int,
    initial_sparsity: float = 0.0,
    exponent: float = 3.0,
) -> Schedule:
    """Gradual pruning: sparsity rises along a polynomial, a new phase at every pruning.

    The last pruning is at ``stop_step`` and reaches ``sparsity`` exactly.

    >>> [round(phase.sparsity, 4) for phase in gradual(sparsity=0.8, total_steps=50, start_step=10, stop_step=30,
    ...                                                every_steps=10).phases]
    [0.0, 0.7, 0.8]

    Args:
        sparsity: Final fraction in [0, 1).
        total_steps: Length of the run in optimizer steps.
        start_step: First step of the ramp; the sparsity there is ``initial_sparsity``.
        stop_step: Last pruning.
        every_steps: Steps between prunings.
        initial_sparsity: Fraction where the ramp starts.
        exponent: 3 is the cubic ramp of the source.

    Raises:
        ScheduleError: If the steps are out of order, or the sparsity would not rise.

    Source: Zhu & Gupta, 2017, arXiv 1710.01878, equation 1.
    """
    _check_steps({"start_step": start_step, "stop_step": stop_step, "total_steps": total_steps})
    _check_steps({"every_steps": every_steps}, least=1)
    if not start_step < stop_step < total_steps:
        raise ScheduleError(
            f"needs start_step < stop_step < total_steps, got start_step={start_step}, stop_step={stop_step}, "
            f"total_steps={total_steps}"
        )
    if check_sparsity(initial_sparsity) > check_sparsity(sparsity):
        raise ScheduleError(f"initial_sparsity = {initial_sparsity} is more than the final sparsity = {sparsity}")
    if not 0 < exponent < math.inf:
        raise ScheduleError(f"exponent needs to be positive and finite, got {exponent}")
    prunings = [*range(start_step, stop_step, every_steps), stop_step]
    lengths = [(start_step, 0.0)] if start_step else []
    for step, following in zip(prunings, [*prunings[1:], total_steps], strict=True):
        left = (1 - (step - start_step) / (stop_step - start_step)) ** exponent
        risen = max(initial_sparsity, sparsity - (sparsity - initial_sparsity) * left)
        lengths.append((following - step, initial_sparsity if step == start_step else risen))
    return phases(_merged(lengths))


def _merged(lengths: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Join neighbouring dense stretches, so that no phase boundary stands where nothing changes."""
    merged: list[tuple[int, float]] = []
    for steps, sparsity in lengths:
        if merged and merged[-1][1] == sparsity == 0.0:
            merged[-1] = (merged[-1][0] + steps, 0.0)
        else:
            merged.append((steps, sparsity))
    return merged


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
    _check_steps({"every_steps": every_steps, "total_steps": total_steps}, least=1)
    stop = total_steps if stop_step is None else stop_step
    _check_steps({"stop_step": stop})
    stop = min(stop, total_steps)
    starts = [0, *range(every_steps, stop, every_steps)]
    return phases([(b - a, sparsity) for a, b in zip(starts, [*starts[1:], total_steps], strict=True)])


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
    _check_steps({"steps_per_epoch": steps_per_epoch}, least=1)
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
    _check_steps({"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}, least=1)
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
