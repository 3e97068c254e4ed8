"""Where the dense half leaves the main course, to be trained on to the end of the same learning-rate schedule."""

from itertools import pairwise

from sparsetwin.errors import ConfigError
from sparsetwin.schedules import Schedule


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
