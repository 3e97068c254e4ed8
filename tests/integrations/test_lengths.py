import subprocess
import sys
from functools import partial

import pytest

from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.integrations.lengths import PhaseLengths, build_method
from sparsetwin.methods import ACDC, IMP, CrAM
from sparsetwin.schedules import Schedule, constant, rounds


@pytest.mark.parametrize(
    ("unit", "lengths"),
    [("fractions", (0.1, 0.2, 0.1, 0.1, 0.2)), ("epochs", (1, 2, 1, 1, 2)), ("steps", (4, 8, 4, 4, 8))],
)
def test_equal_lengths_in_any_unit_make_equal_schedules(unit, lengths):
    names = ("warmup", "sparse", "dense", "final_dense", "final_sparse")
    made = PhaseLengths(sparsity=0.8, unit=unit, **dict(zip(names, lengths, strict=True)))(40, 4)
    assert [(phase.start, phase.sparsity) for phase in made.phases] == [
        (0, 0), (4, 0.8), (12, 0), (16, 0.8), (24, 0), (28, 0.8),
    ]  # fmt: skip


def test_a_method_gets_the_schedule_of_the_run_and_no_other():
    def schedule(total_steps: int, steps_per_epoch: int) -> Schedule:
        return constant(sparsity=0.5, total_steps=total_steps, warmup_steps=steps_per_epoch)

    made = build_method(ACDC, schedule, total_steps=30, steps_per_epoch=10)
    assert made == ACDC(schedule=schedule(30, 10))
    with pytest.raises(ScheduleError, match="has 20 steps, the trainer will do 30"):
        build_method(ACDC, lambda *_: schedule(20, 10), total_steps=30, steps_per_epoch=10)


@pytest.mark.parametrize("rewind", ["weights", "learning-rate"])
def test_a_method_that_goes_back_in_the_learning_rate_schedule_is_refused_with_what_to_use_instead(rewind):
    def in_rounds(total_steps: int, steps_per_epoch: int) -> Schedule:
        return rounds(sparsity=0.9, count=2, round_steps=total_steps // 3, rewind_step=0)

    with pytest.raises(
        ConfigError, match=r"IMP goes back .* schedule of 10 steps, .* 30 .*`sparsetwin train`.*loop of your own"
    ):
        build_method(partial(IMP, rewind=rewind), in_rounds, total_steps=30, steps_per_epoch=10)


def test_a_method_that_passes_twice_over_a_batch_is_refused_with_what_to_use_instead():
    with pytest.raises(ConfigError, match=r"CrAM passes more than once .*`sparsetwin train`.*backward\(closure\)"):
        build_method(
            CrAM,
            lambda total, _: constant(sparsity=0.5, total_steps=total, warmup_steps=6),
            total_steps=9,
            steps_per_epoch=3,
        )


def test_importing_sparsetwin_imports_no_trainer():
    code = "import sparsetwin, sys; print([m for m in sys.modules if m.startswith('sparsetwin.integrations')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
