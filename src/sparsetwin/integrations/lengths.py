"""A schedule for a run whose length only its trainer knows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparsetwin.errors import ScheduleError
from sparsetwin.integrations._served import refuse_unserved
from sparsetwin.methods import Method
from sparsetwin.schedules import Schedule, alternating, in_steps

ScheduleFactory = Callable[[int, int], Schedule]
"""Makes a schedule of (optimizer steps of the run, optimizer steps of one epoch); `PhaseLengths` is one."""

MethodFactory = Callable[..., Method]
"""Makes a method of ``schedule=``: a class such as `ACDC`, or a ``functools.partial`` of it with more options."""


@dataclass(frozen=True, kw_only=True)
class PhaseLengths:
    """An AC/DC schedule in parts of the run, in epochs or in steps.

    >>> lengths = PhaseLengths(
    ...     sparsity=0.8, unit="fractions", warmup=0.1, sparse=0.2, dense=0.1, final_dense=0.1, final_sparse=0.2
    ... )
    >>> [(phase.start, phase.sparsity) for phase in lengths(100, 20).phases]
    [(0, 0.0), (10, 0.8), (30, 0.0), (40, 0.8), (60, 0.0), (70, 0.8)]
    """

    sparsity: float
    """Fraction of the target weights that is zero in sparse phases."""
    unit: Literal["fractions", "epochs", "steps"]
    """Unit of the lengths; fractions are of the whole run."""
    warmup: float
    """Dense start."""
    sparse: float
    """Each sparse phase but the last."""
    dense: float
    """Each dense phase between them."""
    final_dense: float
    """The last dense phase."""
    final_sparse: float
    """The last sparse phase, at least: what the others leave over is added to it."""

    def __call__(self, total_steps: int, steps_per_epoch: int) -> Schedule:
        """Return the schedule of a run.

        Args:
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Optimizer steps of one epoch.

        Raises:
            ScheduleError: If the lengths do not fit the run.
        """

        def steps(length: float) -> int:
            return in_steps(length, self.unit, steps_per_epoch=steps_per_epoch, total_steps=total_steps)

        return alternating(
            sparsity=self.sparsity,
            total_steps=total_steps,
            warmup_steps=steps(self.warmup),
            sparse_steps=steps(self.sparse),
            dense_steps=steps(self.dense),
            final_dense_steps=steps(self.final_dense),
            final_sparse_steps=steps(self.final_sparse),
        )


def build_method(method: MethodFactory, schedule: ScheduleFactory, *, total_steps: int, steps_per_epoch: int) -> Method:
    """Return the method of a run, its schedule exactly as long as the run.

    Args:
        method: Called with ``schedule=``.
        schedule: Called with ``total_steps`` and ``steps_per_epoch``.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of one epoch.

    Raises:
        ScheduleError: If the schedule is shorter or longer than the run.
        ConfigError: If the method cannot be used with a trainer that makes optimizers and schedulers by itself.
    """
    made = schedule(total_steps, steps_per_epoch)
    if made.total_steps != total_steps:
        raise ScheduleError(
            f"the schedule has {made.total_steps} steps, the trainer will do {total_steps} (epochs of "
            f"{steps_per_epoch}); make it from the total_steps that it is called with, or change the trainer's"
        )
    built = method(schedule=made)
    refuse_unserved(built)
    return built
