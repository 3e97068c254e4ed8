"""Every schedule that cannot be is refused with a message of its own, which says what would work."""

import math
import re

import pytest

from sparsetwin.errors import ScheduleError
from sparsetwin.schedules import Phase, Schedule, alternating, constant, gradual, in_steps, paper, periodic, phases


def acdc(**changes):
    given = {
        "sparsity": 0.9, "total_steps": 100, "warmup_steps": 10, "sparse_steps": 5, "dense_steps": 5,
        "final_dense_steps": 10, "final_sparse_steps": 15,
    }  # fmt: skip
    return alternating(**{**given, **changes})


def ramp(**changes):
    given = {"sparsity": 0.8, "total_steps": 50, "start_step": 10, "stop_step": 30, "every_steps": 5}
    return gradual(**{**given, **changes})


def period(**changes):
    return periodic(**{"sparsity": 0.9, "total_steps": 10, "every_steps": 2, **changes})


def convert(value, unit, total_steps=20):
    return in_steps(value, unit, steps_per_epoch=10, total_steps=total_steps)


IMPOSSIBLE = {
    "sparsity in percent": (lambda: acdc(sparsity=90), "got 90; for 90% write 0.9"),
    "half percents": (lambda: acdc(sparsity=97.5), "got 97.5; for 97.5% write 0.975"),
    "nothing left": (lambda: acdc(sparsity=1.0), "got 1.0; nothing would be left"),
    "nothing left, in percent": (lambda: acdc(sparsity=100), "got 100; nothing would be left"),
    "negative sparsity": (lambda: acdc(sparsity=-0.1), "a fraction of zeros in [0, 1), got -0.1"),
    "sparsity is NaN": (lambda: acdc(sparsity=math.nan), "a fraction of zeros in [0, 1), got nan"),
    "sparsity is infinite": (lambda: acdc(sparsity=math.inf), "a fraction of zeros in [0, 1), got inf"),
    "sparsity is a string": (lambda: acdc(sparsity="0.9"), "sparsity is a number, got '0.9'"),
    "sparsity is missing": (lambda: acdc(sparsity=None), "sparsity is a number, got None"),
    "too few sparsities": (lambda: acdc(sparsity=(0.5, 0.9)), "has 8 sparse phases, got 2 sparsities: (0.5, 0.9)"),
    "one bad sparsity of many": (lambda: acdc(sparsity=(0.5,) * 7 + (95,)), "for 95% write 0.95"),
    "negative warm-up": (lambda: acdc(warmup_steps=-1), "warmup_steps needs to be at least 0, got -1"),
    "no total": (lambda: acdc(total_steps=0), "total_steps needs to be at least 1, got 0"),
    "no sparse phases": (lambda: acdc(sparse_steps=0), "sparse_steps needs to be at least 1, got 0"),
    "no dense phases": (lambda: acdc(dense_steps=0), "dense_steps needs to be at least 1, got 0"),
    "no final dense phase": (lambda: acdc(final_dense_steps=0), "final_dense_steps needs to be at least 1, got 0"),
    "negative final phase": (lambda: acdc(final_sparse_steps=-5), "final_sparse_steps needs to be at least 0, got -5"),
    "half a step": (lambda: acdc(warmup_steps=10.5), "warmup_steps is a whole number of optimizer steps, got 10.5"),
    "steps as a float": (lambda: acdc(dense_steps=5.0), "dense_steps is a whole number of optimizer steps, got 5.0"),
    "steps as a truth value": (lambda: acdc(dense_steps=True), "whole number of optimizer steps, got True"),
    "too long": (
        lambda: acdc(total_steps=34),
        "warmup_steps + final_dense_steps + final_sparse_steps = 35 is more than total_steps = 34",
    ),
    "never sparse": (
        lambda: acdc(total_steps=24, final_sparse_steps=0),
        "no sparse phase fits: final_sparse_steps is 0, and 4 of total_steps = 24 are left for sparse_steps = 5",
    ),
    "ramp backwards": (lambda: ramp(start_step=30, stop_step=10), "stop_step < total_steps, got start_step=30"),
    "ramp past the end": (lambda: ramp(stop_step=50), "got start_step=10, stop_step=50, total_steps=50"),
    "ramp from below zero": (lambda: ramp(start_step=-1), "start_step needs to be at least 0, got -1"),
    "ramp without prunings": (lambda: ramp(every_steps=0), "every_steps needs to be at least 1, got 0"),
    "ramp that falls": (lambda: ramp(initial_sparsity=0.9), "is more than the final sparsity = 0.8"),
    "ramp to 80": (lambda: ramp(sparsity=80), "for 80% write 0.8"),
    "ramp that never moves": (lambda: ramp(exponent=0), "exponent needs to be positive and finite, got 0"),
    "ramp of no shape": (lambda: ramp(exponent=math.nan), "exponent needs to be positive and finite, got nan"),
    "period of nothing": (lambda: period(every_steps=0), "every_steps needs to be at least 1"),
    "period without a run": (lambda: period(total_steps=0), "total_steps needs to be at least 1"),
    "period that stops before it starts": (
        lambda: period(stop_step=-1), "stop_step needs to be at least 0, got -1",
    ),
    "period of 90": (lambda: period(sparsity=90), "for 90% write 0.9"),
    "constant without a run": (lambda: constant(sparsity=0.9, total_steps=0), "total_steps needs to be at least 1"),
    "constant, all warm-up": (
        lambda: constant(sparsity=0.9, total_steps=5, warmup_steps=5), "warmup_steps = 5 leaves nothing of total_",
    ),
    "constant, negative warm-up": (
        lambda: constant(sparsity=0.9, total_steps=5, warmup_steps=-5), "warmup_steps needs to be at least 0",
    ),
    "no phase": (lambda: phases([]), "at least one phase, got none"),
    "empty phase": (lambda: phases([(3, 0.0), (0, 0.9)]), "the length of phase 1 needs to be at least 1, got 0"),
    "phase of half a step": (lambda: phases([(2.5, 0.0)]), "the length of phase 0 is a whole number of"),
    "phase of 90": (lambda: phases([(3, 90)]), "for 90% write 0.9"),
    "gap": (
        lambda: Schedule((Phase(0, 0, 5, 0.0), Phase(1, 6, 9, 0.9))), "phase 1 should have index 1 and start at step 5",
    ),
    "overlap": (
        lambda: Schedule((Phase(0, 0, 5, 0.0), Phase(1, 4, 9, 0.9))), "phase 1 should have index 1 and start at step 5",
    ),
    "late start": (lambda: Schedule((Phase(0, 1, 5, 0.0),)), "phase 0 should have index 0 and start at step 0"),
    "wrong index": (lambda: Schedule((Phase(1, 0, 5, 0.0),)), "phase 0 should have index 0"),
    "backwards": (lambda: Schedule((Phase(0, 0, 0, 0.0),)), "a phase needs at least one step"),
    "stop is not whole": (lambda: Schedule((Phase(0, 0, 2.5, 0.0),)), "stop is a whole number of optimizer steps"),
    "phase of NaN": (lambda: Schedule((Phase(0, 0, 5, math.nan),)), "got nan"),
    "before the start": (lambda: phases([(3, 0.0)]).at(-1), "steps are counted from 0, got -1"),
    "scaled to nothing": (lambda: phases([(3, 0.0)]).scaled(0), "steps_per_unit needs to be at least 1, got 0"),
    "unknown name": (
        lambda: paper("imagnet-100", sparsity=0.9, steps_per_epoch=1), "unknown schedule 'imagnet-100'; known: ima",
    ),
    "name nearly right": (lambda: paper("cifar200", sparsity=0.9, steps_per_epoch=1), "did you mean 'cifar-200'?"),
    "epochs without steps": (
        lambda: paper("cifar-200", sparsity=0.9, steps_per_epoch=0), "steps_per_epoch needs to be at least 1, got 0",
    ),
    "published at 95": (lambda: paper("cifar-200", sparsity=95, steps_per_epoch=2), "for 95% write 0.95"),
    "unknown unit": (
        lambda: convert(1, "epoch"), "unknown unit 'epoch'; known: steps, epochs, fractions",
    ),
    "negative length": (lambda: convert(-1, "epochs"), "got -1 epochs"),
    "length is NaN": (lambda: convert(math.nan, "epochs"), "got nan epochs"),
    "half a step as a length": (
        lambda: convert(1.5, "steps"), "a length in steps is a whole number, got 1.5",
    ),
    "more than the run": (
        lambda: convert(1.5, "fractions"), "a fraction of the run is at most 1, got 1.5",
    ),
    "a length that vanishes": (
        lambda: convert(0.01, "epochs"), "0.01 epochs are less than half a step of 10",
    ),
    "a run of no steps": (
        lambda: convert(1, "fractions", total_steps=0), "total_steps needs to be at least 1, got 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_schedule_is_refused_by_what_is_wrong_with_it(case):
    make, message = IMPOSSIBLE[case]
    with pytest.raises(ScheduleError, match=re.escape(message)):
        make()
