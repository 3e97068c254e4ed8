"""Schedules: the published phase tables, what holds for every schedule, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetwin.errors import ScheduleError
from sparsetwin.schedules import (
    Phase,
    Schedule,
    acdc_plus_plus,
    alternating,
    constant,
    gradual,
    grouped,
    in_steps,
    paper,
    periodic,
    phases,
    ramped,
    rounds,
)


def table(schedule):
    """Return the phases as the paper's tables write them, first and last epoch inclusive: ``D0-9 S10-14 ...``."""
    return " ".join(f"{'S' if p.is_sparse else 'D'}{p.start}-{p.stop - 1}" for p in schedule.phases)


def epochs(schedule):
    """Return the number of sparse and of dense epochs."""
    sparse = sum(phase.steps for phase in schedule.phases if phase.is_sparse)
    return sparse, schedule.total_steps - sparse


IMAGENET_100 = (
    "D0-9 S10-14 D15-19 S20-24 D25-29 S30-34 D35-39 S40-44 D45-49 S50-54 D55-59 S60-64 D65-69 S70-74 D75-84 S85-99"
)
IMAGENET_150 = (
    "D0-9 S10-14 D15-19 S20-24 D25-29 S30-34 D35-39 S40-44 D45-49 S50-54 D55-59 S60-64 D65-69 S70-74 D75-79 S80-84 "
    "D85-89 S90-94 D95-99 S100-104 D105-109 S110-114 D115-119 S120-124 D125-134 S135-149"
)
IMAGENET_200 = (
    "D0-9 S10-14 D15-19 S20-24 D25-29 S30-34 D35-39 S40-44 D45-49 S50-54 D55-59 S60-64 D65-69 S70-74 D75-79 S80-84 "
    "D85-89 S90-94 D95-99 S100-104 D105-109 S110-114 D115-119 S120-124 D125-129 S130-134 D135-139 S140-144 D145-149 "
    "S150-154 D155-159 S160-164 D165-169 S170-174 D175-184 S185-199"
)
CIFAR_200 = "D0-9 S10-29 D30-49 S50-69 D70-89 S90-109 D110-129 S130-149 D150-169 S170-199"
CIFAR_225 = "D0-9 S10-29 D30-42 S43-62 D63-75 S76-95 D96-108 S109-128 D129-141 S142-161 D162-174 S175-224"
CIFAR_SPARSITIES = (0.5, 0.75, 0.9, 0.95)
TRANSFORMER_XL = "D0-4 S5-7 D8-10 S11-13 D14-16 S17-19 D20-22 S23-25 D26-28 S29-31 D32-38 S39-47"

PUBLISHED = [
    # experiment, name, sparsity, phases, sparse and dense epochs
    ("ResNet-50 on ImageNet, global 50%", "imagenet-100", 0.5, IMAGENET_100, (50, 50)),
    ("ResNet-50 on ImageNet, global and inner layers 80%", "imagenet-100", 0.8, IMAGENET_100, (50, 50)),
    ("ResNet-50 on ImageNet, global, inner layers and uniform 90%", "imagenet-100", 0.9, IMAGENET_100, (50, 50)),
    ("ResNet-50 on ImageNet, global, inner layers and uniform 95%", "imagenet-100", 0.95, IMAGENET_100, (50, 50)),
    ("ResNet-50 on ImageNet, global and inner layers 98%", "imagenet-100", 0.98, IMAGENET_100, (50, 50)),
    ("ResNet-50 on ImageNet, 2:4", "imagenet-100", 0.5, IMAGENET_100, (50, 50)),
    ("MobileNetV1 on ImageNet, global and without depthwise 75%", "imagenet-100", 0.75, IMAGENET_100, (50, 50)),
    ("MobileNetV1 on ImageNet, global and without depthwise 90%", "imagenet-100", 0.9, IMAGENET_100, (50, 50)),
    ("ResNet-50 on ImageNet, global 90%, 150 epochs", "imagenet-150", 0.9, IMAGENET_150, (75, 75)),
    ("ResNet-50 on ImageNet, uniform 90%, 200 epochs", "imagenet-200", 0.9, IMAGENET_200, (100, 100)),
    ("ResNet-50 on ImageNet, uniform 95%, 200 epochs", "imagenet-200", 0.95, IMAGENET_200, (100, 100)),
    *[(f"WRN-28-10 on CIFAR-100, freq20, {s:.0%}", "cifar-200", s, CIFAR_200, (110, 90)) for s in CIFAR_SPARSITIES],
    *[(f"WRN-28-10 on CIFAR-100, dense13, {s:.0%}", "cifar-225", s, CIFAR_225, (150, 75)) for s in CIFAR_SPARSITIES],
    *[(f"ResNet-20 on random labels, {s:.0%}", "cifar-200", s, CIFAR_200, (110, 90)) for s in CIFAR_SPARSITIES],
    ("Transformer-XL on WikiText-103, 80%", "transformer-xl-48", 0.8, TRANSFORMER_XL, (24, 24)),
    ("Transformer-XL on WikiText-103, 90%", "transformer-xl-48", 0.9, TRANSFORMER_XL, (24, 24)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sparsity", "expected", "counts"), [p[1:] for p in PUBLISHED], ids=[p[0] for p in PUBLISHED]
)
def test_every_released_experiment_has_its_published_phases(name, sparsity, expected, counts):
    schedule = paper(name, sparsity=sparsity, steps_per_epoch=1)
    assert table(schedule) == expected
    assert epochs(schedule) == counts
    assert {phase.sparsity for phase in schedule.phases} == {0.0, sparsity}


@pytest.mark.parametrize("name", ["imagenet-100", "imagenet-150", "imagenet-200", "cifar-225", "transformer-xl-48"])
def test_a_published_schedule_in_steps_is_the_one_in_epochs_scaled(name):
    in_epochs = paper(name, sparsity=0.9, steps_per_epoch=1)
    assert paper(name, sparsity=0.9, steps_per_epoch=5005) == in_epochs.scaled(5005)
    assert in_epochs.scaled(5005).phases[1].start == in_epochs.phases[1].start * 5005


@pytest.mark.parametrize(("sparsity", "last"), [(0.8, 0.799), (0.9, 0.899)])
def test_gradual_pruning_has_the_published_values_and_then_reaches_the_target(sparsity, last):
    schedule = gradual(
        sparsity=sparsity, total_steps=100, start_step=1, stop_step=40, every_steps=5, initial_sparsity=0.05
    )
    sparse = [phase for phase in schedule.phases if phase.is_sparse]
    assert [phase.start for phase in sparse] == [1, 6, 11, 16, 21, 26, 31, 36, 40]
    values = [round(phase.sparsity, 3) for phase in sparse]
    if sparsity == 0.8:
        assert values[:-1] == [0.05, 0.303, 0.492, 0.625, 0.713, 0.765, 0.791, 0.799]
    assert values[-2] == last
    assert sparse[0].sparsity == 0.05
    assert sparse[-1].sparsity == sparsity
    assert schedule.phases[0] == Phase(index=0, start=0, stop=1, sparsity=0.0)


lengths = st.integers(1, 40)


@st.composite
def alternations(draw):
    given = {
        "warmup_steps": draw(st.integers(0, 40)),
        "sparse_steps": draw(lengths),
        "dense_steps": draw(lengths),
        "final_dense_steps": draw(lengths),
        "final_sparse_steps": draw(lengths),
    }
    least = given["warmup_steps"] + given["final_dense_steps"] + given["final_sparse_steps"]
    return {**given, "total_steps": least + draw(st.integers(0, 300))}


def assert_covers(schedule, total_steps):
    assert schedule.phases[0].start == 0
    assert schedule.total_steps == schedule.phases[-1].stop == total_steps
    for first, second in zip(schedule.phases, schedule.phases[1:], strict=False):
        assert (second.start, second.index) == (first.stop, first.index + 1)
    for phase in schedule.phases:
        assert phase.steps >= 1
        assert schedule.at(phase.start) is schedule.at(phase.stop - 1) is phase


@given(alternations())
def test_alternating_phases_cover_the_run_and_the_remainder_lengthens_the_final_sparse_phase(given):
    schedule = alternating(sparsity=0.9, **given)
    assert_covers(schedule, given["total_steps"])
    for first, second in zip(schedule.phases, schedule.phases[1:], strict=False):
        assert first.is_sparse != second.is_sparse
    *before, final_dense, final_sparse = schedule.phases
    assert final_sparse.is_sparse
    remainder = final_sparse.steps - given["final_sparse_steps"]
    assert 0 <= remainder < given["dense_steps"] + given["sparse_steps"]
    if any(phase.is_sparse for phase in before):
        assert final_dense.steps == given["final_dense_steps"]
        assert {phase.steps for phase in before if phase.is_sparse} == {given["sparse_steps"]}
        assert before[0].is_sparse == (given["warmup_steps"] == 0)
        between = [phase.steps for phase in before if not phase.is_sparse and phase.start]
        assert set(between) <= {given["dense_steps"]}
    else:  # no room for a sparse phase between warm-up and final dense phase: they are one
        assert final_dense.steps == given["warmup_steps"] + given["final_dense_steps"]
        assert remainder < given["sparse_steps"]


def test_a_remainder_goes_to_the_final_sparse_phase():
    schedule = alternating(
        sparsity=0.9, total_steps=103, warmup_steps=10, sparse_steps=5, dense_steps=5, final_dense_steps=10,
        final_sparse_steps=15,
    )  # fmt: skip
    assert table(schedule) == IMAGENET_100.replace("S85-99", "S85-102")


def test_a_run_that_ends_dense_gives_the_remainder_to_its_final_dense_phase():
    schedule = alternating(
        sparsity=0.9, total_steps=33, warmup_steps=5, sparse_steps=5, dense_steps=5, final_dense_steps=5,
        final_sparse_steps=0,
    )  # fmt: skip
    assert table(schedule) == "D0-4 S5-9 D10-14 S15-19 D20-32"
    assert schedule.final_sparsity == 0.9


def test_each_sparse_phase_may_have_a_sparsity_of_its_own():
    schedule = alternating(
        sparsity=(0.5, 0.8, 0.9), total_steps=40, warmup_steps=5, sparse_steps=5, dense_steps=5, final_dense_steps=5,
        final_sparse_steps=15,
    )  # fmt: skip
    assert [phase.sparsity for phase in schedule.phases] == [0.0, 0.5, 0.0, 0.8, 0.0, 0.9]
    assert schedule.final_sparsity == 0.9


def test_a_hundred_thousand_phases_of_one_step_alternate_to_the_end():
    schedule = alternating(
        sparsity=0.9, total_steps=100_000, warmup_steps=0, sparse_steps=1, dense_steps=1, final_dense_steps=1,
        final_sparse_steps=1,
    )  # fmt: skip
    assert len(schedule.phases) == 100_000 - 1
    assert all(schedule.at(step).is_sparse == (step % 2 == 0) for step in range(0, 99_998, 97))


@given(
    st.integers(0, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.floats(0.1, 0.99),
    st.floats(0, 0.1), st.floats(0.5, 5),
)  # fmt: skip
def test_gradual_sparsity_rises_from_start_to_target_and_covers_the_run(
    start, ramp, rest, every, sparsity, initial, power
):
    total = start + ramp + rest
    schedule = gradual(
        sparsity=sparsity, total_steps=total, start_step=start, stop_step=start + ramp, every_steps=every,
        initial_sparsity=initial, exponent=power,
    )  # fmt: skip
    assert_covers(schedule, total)
    values = [phase.sparsity for phase in schedule.phases]
    assert values == sorted(values)
    assert schedule.at(start).sparsity == initial
    assert schedule.at(total - 1).sparsity == schedule.final_sparsity == sparsity
    assert schedule.phases[-1].start == start + ramp


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 60), st.integers(1, 12), st.integers(1, 80))
def test_gradual_pruning_may_go_on_in_phases_of_the_final_sparsity(start, ramp, rest, every, final_every):
    total, stop = start + ramp + rest, start + ramp
    given = {"sparsity": 0.9, "total_steps": total, "start_step": start, "stop_step": stop, "every_steps": every}
    schedule = gradual(**given, final_every_steps=final_every)
    assert_covers(schedule, total)
    assert [phase.start for phase in schedule.phases if phase.start >= stop] == [*range(stop, total, final_every)]
    assert {phase.sparsity for phase in schedule.phases if phase.start >= stop} == {0.9}
    plain = gradual(**given)
    assert plain.phases[:-1] == schedule.phases[: len(plain.phases) - 1]
    assert plain == gradual(**given, final_every_steps=rest)


@given(st.integers(1, 200), st.integers(1, 50), st.none() | st.integers(0, 250))
def test_periodic_updates_come_at_every_multiple_before_the_stop(total, every, stop):
    schedule = periodic(sparsity=0.9, total_steps=total, every_steps=every, stop_step=stop)
    assert_covers(schedule, total)
    last = total if stop is None else min(stop, total)
    assert [phase.start for phase in schedule.phases] == [0, *range(every, last, every)]
    assert {phase.sparsity for phase in schedule.phases} == {0.9}


def test_a_constant_schedule_has_one_sparse_phase_after_its_warmup():
    assert table(constant(sparsity=0.9, total_steps=10)) == "S0-9"
    assert table(constant(sparsity=0.9, total_steps=10, warmup_steps=3)) == "D0-2 S3-9"
    assert table(constant(sparsity=0.0, total_steps=10, warmup_steps=3)) == "D0-9"
    assert constant(sparsity=0.0, total_steps=10).final_sparsity == 0.0


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.0, 0.3, 0.9])), min_size=1, max_size=12))
def test_any_explicit_list_of_phases_is_kept_as_it_is(given):
    schedule = phases(given)
    assert_covers(schedule, sum(steps for steps, _ in given))
    assert [(phase.steps, phase.sparsity) for phase in schedule.phases] == given
    assert Schedule(list(schedule.phases)) == schedule
    assert hash(Schedule(list(schedule.phases))) == hash(schedule)


def test_numbers_of_numpy_become_python_numbers():
    schedule = phases([(np.int64(3), np.float64(0.5)), (2, 0)])
    assert [type(value) for phase in schedule.phases for value in (phase.stop, phase.sparsity)] == [int, float] * 2


def test_past_its_end_a_schedule_stays_in_its_last_phase():
    schedule = phases([(4, 0.0), (6, 0.9)])
    assert [schedule.at(step).index for step in (0, 3, 4, 9, 10, 10**9)] == [0, 0, 1, 1, 1, 1]
    assert schedule.at(10**9) == Phase(index=1, start=4, stop=10, sparsity=0.9)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(7, "steps", 7), (7.0, "steps", 7), (0.5, "epochs", 50), (3, "epochs", 300), (0.25, "fractions", 250),
     (1, "fractions", 1000), (0.0, "epochs", 0), (0.0146, "epochs", 1), (0.1234, "fractions", 123)],
)  # fmt: skip
def test_lengths_convert_to_the_nearest_whole_step(value, unit, expected):
    assert in_steps(value, unit, steps_per_epoch=100, total_steps=1000) == expected
    assert math.isclose(expected, value * {"steps": 1, "epochs": 100, "fractions": 1000}[unit], abs_tol=0.5)


def test_the_layout_of_acdc_plus_plus_is_that_of_the_papers_run_of_100_epochs_and_grows_with_the_run():
    assert acdc_plus_plus(sparsity=0.9, total_steps=100) == paper("imagenet-100", sparsity=0.9, steps_per_epoch=1)
    for total in (20, 137, 1000):
        schedule = acdc_plus_plus(sparsity=0.8, total_steps=total)
        assert schedule.total_steps == total
        assert [phase.is_sparse for phase in schedule.phases] == [False, True] * 8
        parts = [phase.steps / total for phase in schedule.phases]
        assert parts == pytest.approx([0.1, *[0.05] * 13, 0.1, 0.15], abs=1 / total)


def test_a_ramp_reaches_the_sparsity_of_each_sparse_phase_in_its_last_pruning():
    plain = phases([(3, 0.0), (10, 0.9), (2, 0.0), (6, 0.5)])
    schedule = ramped(plain, ramp_steps=5, prunings=3)
    assert schedule.total_steps == plain.total_steps
    assert [(phase.start, phase.stop) for phase in schedule.phases] == [
        (0, 3), (3, 5), (5, 8), (8, 13), (13, 15), (15, 17), (17, 20), (20, 21)
    ]  # fmt: skip
    rises = [(1 - math.exp(-4 * t)) / (1 - math.exp(-4)) for t in (1 / 3, 2 / 3)]
    expected = [0.0, 0.9 * rises[0], 0.9 * rises[1], 0.9, 0.0, 0.5 * rises[0], 0.5 * rises[1], 0.5]
    assert [phase.sparsity for phase in schedule.phases] == pytest.approx(expected)
    assert ramped(plain, ramp_steps=0, prunings=1) == plain
    assert ramped(schedule, ramp_steps=1, prunings=1) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ramped(phases([(4, 0.5)]), ramp_steps=4, prunings=2), "a ramp of 4 steps does not fit into a sparse"),
        (lambda: ramped(phases([(9, 0.5)]), ramp_steps=1, prunings=3), "ramp_steps needs to be at least 2, got 1"),
        (lambda: ramped(phases([(9, 0.5)]), ramp_steps=1, prunings=2, steepness=0), "steepness needs to be positive"),
        (lambda: acdc_plus_plus(sparsity=0.9, total_steps=19), "total_steps needs to be at least 20"),
        (lambda: rounds(sparsity=0.9, count=1, round_steps=5, rewind_step=5), "rewind_step = 5 leaves nothing of"),
        (lambda: rounds(sparsity=1.0, count=1, round_steps=5), "nothing would be left"),
    ],
)
def test_ramps_and_rounds_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()


def test_every_round_prunes_the_same_fraction_of_what_is_left():
    schedule = rounds(sparsity=0.9, count=4, round_steps=10, rewind_step=3)
    densities = [1 - phase.sparsity for phase in schedule.phases if phase.is_sparse]
    assert densities == pytest.approx([0.1 ** (index / 4) for index in range(1, 5)])
    assert schedule.final_sparsity == 0.9
    assert {phase.steps for phase in schedule.phases[1:]} == {7}


def test_a_ramp_of_groups_prunes_where_each_multiple_is_reached_and_ends_where_it_did():
    ramp = gradual(sparsity=0.75, total_steps=100, start_step=10, stop_step=90, every_steps=1)
    found = [(phase.start, phase.sparsity) for phase in grouped(ramp, m=4).phases]
    first = {s: next(p.start for p in ramp.phases if p.sparsity >= s) for s in (0.25, 0.5)}
    assert found == [(0, 0.0), (first[0.25], 0.25), (first[0.5], 0.5), (90, 0.75)]
    plain = phases([(3, 0.0), (10, 0.5), (2, 0.0), (6, 0.25)])
    assert grouped(plain, m=4) == plain
    sparse = [p for p in grouped(ramped(plain, ramp_steps=4, prunings=4), m=4).phases if p.is_sparse]
    assert [(p.start, p.stop, p.sparsity) for p in sparse] == [(3, 7, 0.25), (7, 13, 0.5), (19, 21, 0.25)]


def test_mask_updates_at_one_sparsity_stay_apart_in_groups():
    updates = periodic(sparsity=0.5, total_steps=10, every_steps=3)
    assert grouped(updates, m=4) == updates


@given(
    m=st.integers(2, 16),
    pruned=st.data(),
    every_steps=st.integers(1, 9),
    initial=st.floats(0, 1, exclude_max=True),
)
def test_groups_can_have_every_sparsity_of_a_grouped_schedule(m, pruned, every_steps, initial):
    final = pruned.draw(st.integers(1, m - 1)) / m
    ramp = gradual(
        sparsity=final, total_steps=60, start_step=4, stop_step=50, every_steps=every_steps,
        initial_sparsity=initial * final,
    )  # fmt: skip
    found = grouped(ramp, m=m)
    assert found.total_steps == ramp.total_steps
    assert found.final_sparsity == final
    for step in range(60):
        asked, given_ = ramp.at(step).sparsity, found.at(step).sparsity
        assert given_ * m == pytest.approx(round(given_ * m))
        assert asked - 1 / m - 1e-9 < given_ <= asked + 1e-9
    assert grouped(found, m=m) == found


@pytest.mark.parametrize(("sparsity", "m", "message"), [
    (0.9, 4, r"groups of 4 weights cannot have the final sparsity of 0.9; 0.75 or another multiple of 1/4 works"),
    (0.5, 1, "m needs to be at least 2"),
    (0.5, 2.0, "m is a whole number"),
])  # fmt: skip
def test_a_final_sparsity_that_groups_cannot_have_is_refused(sparsity, m, message):
    with pytest.raises(ScheduleError, match=message):
        grouped(phases([(1, 0.25), (1, sparsity)]), m=m)
