"""When a network is dense and when it is sparse: phases as plain numbers, counted in optimizer steps.

The paper's ImageNet run is twelve numbers in four lists of its configuration file; here it is one call
(in epochs; multiply by the steps of an epoch to train with it):

>>> schedule = alternating(sparsity=0.9, total_steps=100, warmup_steps=10, sparse_steps=5, dense_steps=5,
...                        final_dense_steps=10, final_sparse_steps=15)
>>> [phase.start for phase in schedule.phases if phase.is_sparse]   # the eight prunings
[10, 20, 30, 40, 50, 60, 70, 85]
"""

from sparsetwin.schedules._alternating import PAPER_NAMES, acdc_plus_plus, alternating, paper, ramped
from sparsetwin.schedules._grouped import grouped
from sparsetwin.schedules._phase import Phase, Schedule, check_sparsity, constant, phases
from sparsetwin.schedules._pruning import gradual, periodic, rounds
from sparsetwin.schedules._units import in_steps

__all__ = [
    "PAPER_NAMES",
    "Phase",
    "Schedule",
    "acdc_plus_plus",
    "alternating",
    "check_sparsity",
    "constant",
    "gradual",
    "grouped",
    "in_steps",
    "paper",
    "periodic",
    "phases",
    "ramped",
    "rounds",
]
