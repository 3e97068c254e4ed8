"""Where the dense half leaves the main course, to be trained on to the end of the same learning-rate schedule."""

from itertools import pairwise

from sparsetwin.errors import ConfigError
from sparsetwin.methods import Method
from sparsetwin.schedules import Schedule

_DENSE_HALF = 0.5  # of the learning-rate schedule


def branch_step(schedule: Schedule) -> int:
    """Return the end of the last dense phase, after which the final sparse phases begin.

    Raises:
        ConfigError: If no sparse phase follows a dense one, or the schedule ends dense.

    Source: Peste et al., 2021, arXiv 2106.12379, and its published code ("ftdense").
    """
    phases = schedule.phases
    if not any(phase.is_sparse for phase in phases):
        raise ConfigError(
            "dense_finetune trains the dense half on where the last sparse phase begins, but this run is dense "
            "throughout; leave it out (--no-dense-finetune)"
        )
    if not phases[-1].is_sparse:
        raise ConfigError(
            "dense_finetune trains the dense half on beside the last sparse phase, but this schedule ends dense and so "
            "trains it to the end anyway; leave it out (--no-dense-finetune)"
        )
    ends = [before.stop for before, after in pairwise(phases) if after.is_sparse and not before.is_sparse]
    if not ends:
        raise ConfigError(
            "dense_finetune needs a dense phase before a sparse one, but this schedule has none; leave it out "
            "(--no-dense-finetune)"
        )
    return ends[-1]


def has_dense_half(method: Method) -> bool:
    """Return whether the last dense phase ends in the second half of the learning-rate schedule, or at its end.

    What ends earlier, such as the few dense steps before gradual pruning, is the begin of a sparse network and no
    trained dense one.

    >>> from sparsetwin import ACDC, GMP, schedules
    >>> has_dense_half(ACDC(schedule=schedules.phases([(60, 0.0), (40, 0.9)])))
    True
    >>> has_dense_half(GMP(schedule=schedules.phases([(10, 0.0), (90, 0.9)])))
    False

    Args:
        method: With its schedule.
    """
    ends = [phase.stop for phase in method.schedule.phases if not phase.is_sparse]
    if not ends:
        return False
    done = method.learning_rate_step(ends[-1] - 1) + 1
    return done >= _DENSE_HALF * method.learning_rate_steps


def finetuning_step(method: Method) -> int:
    """Return the step at which the dense half leaves the main course, to be trained on.

    Raises:
        ConfigError: If there is none, or the dense half is trained to the end of its learning-rate schedule anyway.
    """
    step = branch_step(method.schedule)
    if method.learning_rate_steps != method.schedule.total_steps:
        raise ConfigError(
            f"{type(method).__name__} takes its dense half to the end of the learning-rate schedule before it prunes, "
            "so dense_finetune has nothing to train on; leave it out (--no-dense-finetune)"
        )
    return step
