"""Phases that follow each other: pure data."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from sparsetwin.errors import ScheduleError


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
            check_steps({"start": phase.start, "stop": phase.stop})
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
        check_steps({"steps_per_unit": steps_per_unit}, least=1)
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


def check_steps(given: Mapping[str, int], *, least: int = 0) -> None:
    """Refuse lengths that are no whole numbers of at least ``least`` steps.

    Raises:
        ScheduleError: Naming the first of them.
    """
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
        check_steps({f"the length of phase {len(made)}": steps}, least=1)
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
    check_steps({"total_steps": total_steps}, least=1)
    check_steps({"warmup_steps": warmup_steps})
    if warmup_steps >= total_steps:
        raise ScheduleError(f"warmup_steps = {warmup_steps} leaves nothing of total_steps = {total_steps}")
    warmup = [(warmup_steps, 0.0)] if warmup_steps else []
    return phases(merged([*warmup, (total_steps - warmup_steps, sparsity)]))


def merged(lengths: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Join neighbouring dense stretches, so that no phase boundary stands where nothing changes."""
    merged: list[tuple[int, float]] = []
    for steps, sparsity in lengths:
        if merged and merged[-1][1] == sparsity == 0.0:
            merged[-1] = (merged[-1][0] + steps, 0.0)
        else:
            merged.append((steps, sparsity))
    return merged
