"""Every method's schedule from a recipe: its usual one, other ones, and what none of them uses."""

import dataclasses
from itertools import pairwise

import pytest

from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.methods import METHODS, Method
from sparsetwin.recipes import (
    RECIPES,
    MethodSettings,
    ScheduleSettings,
    check_recipe,
    find_recipe,
)
from sparsetwin.schedules import paper, phases, ramped

STEPS = 100  # of an epoch


def built(method: str, *, epochs: int = 10, **schedule: object) -> Method:
    return MethodSettings(name=method).build(ScheduleSettings(**schedule), steps_per_epoch=STEPS, epochs=epochs)


def turns(method: Method) -> list[int]:
    """Return the step at which each phase begins."""
    return [phase.start for phase in method.schedule.phases]


class TestUsualSchedules:
    """In a run of 1000 steps."""

    @pytest.mark.parametrize("name", ["static", "snip", "topkast"])
    def test_one_sparsity_throughout(self, name):
        assert [(p.steps, p.sparsity) for p in built(name).schedule.phases] == [(1000, 0.9)]

    def test_dense(self):
        assert [(p.steps, p.sparsity) for p in built("dense").schedule.phases] == [(1000, 0.0)]

    def test_gmp_prunes_from_a_tenth_to_three_quarters_and_ends_exactly(self):
        found = built("gmp")
        assert turns(found)[1:] == [*range(120, 750, 20), 750]  # at 100 the cubic ramp begins, at zero
        assert found.schedule.phases[-1].sparsity == 0.9
        assert found.schedule.at(130).sparsity == pytest.approx(0.9 - 0.9 * (1 - 20 / 650) ** 3)

    def test_the_sparsity_of_st3_rises_from_the_first_step_on(self):
        assert turns(built("st3")) == list(range(0, 751, 10))

    def test_granet_prunes_for_half_the_run_and_regenerates_to_its_end(self):
        schedule = built("granet").schedule
        assert [phase.start for phase in schedule.phases] == list(range(0, 1000, 10))
        assert all(before.sparsity < after.sparsity for before, after in pairwise(schedule.phases[:51]))
        assert {phase.sparsity for phase in schedule.phases if phase.start >= 500} == {0.9}

    @pytest.mark.parametrize(("name", "stop"), [("rigl", 750), ("set", 1000)])
    def test_masks_move_a_hundred_times_a_run(self, name, stop):
        assert turns(built(name)) == list(range(0, stop, 10))

    def test_oneshot_prunes_in_the_middle_and_cram_in_the_last_step(self):
        assert turns(built("oneshot")) == [0, 500]
        assert turns(built("cram")) == [0, 999]

    def test_woodfisher_prunes_six_times(self):
        assert turns(built("woodfisher")) == [0, 100, 200, 300, 400, 500, 600]

    def test_str_learns_thresholds_before_a_last_phase_in_which_it_may_cut(self):
        found = MethodSettings(name="str", options={"exact_final": True}).build(
            ScheduleSettings(), steps_per_epoch=STEPS, epochs=10
        )
        assert [(p.start, p.sparsity) for p in found.schedule.phases] == [(0, 0.9), (800, 0.9)]

    @pytest.mark.parametrize("epochs", [3, 10, 37])
    @pytest.mark.parametrize("rounds", [1, 3, 7])
    def test_rounds_of_imp_are_equal_and_fill_the_run(self, epochs, rounds):
        schedule = built("imp", epochs=epochs, rounds=rounds).schedule
        sparse = [phase.steps for phase in schedule.phases if phase.is_sparse]
        assert len(sparse) == rounds
        assert set(sparse) == {schedule.phases[-rounds - 1].steps}
        assert schedule.total_steps == epochs * STEPS
        rewind = schedule.phases[1].start
        assert abs(rewind - 0.05 * epochs * STEPS) <= (rounds + 1) / 2

    def test_rounds_that_do_not_fit_are_refused(self):
        with pytest.raises(ScheduleError, match="2 steps are too few for 3 rounds"):
            MethodSettings(name="imp").build(ScheduleSettings(), steps_per_epoch=2, epochs=1)

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_has_one_in_every_recipe(self, recipe, name):
        made = find_recipe(recipe)
        found = dataclasses.replace(made.method, name=name).build(
            made.schedule, steps_per_epoch=18, epochs=made.train.epochs
        )
        assert found.schedule.total_steps == 18 * made.train.epochs
        assert found.schedule.final_sparsity == (0.0 if name == "dense" else 0.9)

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_has_one_in_a_run_of_a_few_steps(self, name):
        schedule = ScheduleSettings(
            unit="fractions", warmup=0.1, sparse=0.2, dense=0.2, final_dense=0.1, final_sparse=0.2
        )
        assert MethodSettings(name=name).build(schedule, steps_per_epoch=18, epochs=1).schedule.total_steps == 18


class TestOtherSchedules:
    @pytest.mark.parametrize(("unit", "scale"), [("epochs", 1.0), ("steps", 100.0), ("fractions", 0.1)])
    def test_places_are_given_in_the_unit_of_the_lengths(self, unit, scale):
        found = built("gmp", unit=unit, start=2 * scale, stop=6 * scale, every=1 * scale)
        assert turns(found) == [0, 300, 400, 500, 600]

    def test_a_kind_of_another_method_can_be_asked_for(self):
        assert turns(built("gmp", kind="oneshot", start=4.0)) == [0, 400]
        assert turns(built("gmp", kind="oneshot")) == [0, 500]
        assert turns(built("acdc", kind="gradual")) == turns(built("gmp"))
        assert turns(built("acdc", kind="gradual", start=1.0, stop=3.0, every=1.0)) == [0, 200, 300]
        assert turns(built("oneshot", kind="oneshot", start=0.0)) == [0]

    def test_a_schedule_that_the_method_cannot_follow_is_refused_by_the_method(self):
        with pytest.raises(ScheduleError, match="RigL keeps one sparsity"):
            built("rigl", kind="oneshot")
        with pytest.raises(ScheduleError, match="GMP brings no weight back"):
            built("gmp", kind="alternating", warmup=2, sparse=2, dense=2, final_dense=2, final_sparse=4)

    def test_a_gradual_one_may_begin_sparse(self):
        found = built("granet", initial_sparsity=0.5)
        assert found.schedule.phases[0].sparsity == 0.5

    def test_granet_regenerates_as_often_as_it_prunes(self):
        found = built("granet", stop=3.0, every=0.8)
        assert turns(found) == [0, 80, 160, 240, 300, 380, 460, 540, 620, 700, 780, 860, 940]
        assert [phase.sparsity == 0.9 for phase in found.schedule.phases] == [False] * 4 + [True] * 9

    def test_a_cut_may_come_earlier(self):
        assert turns(built("cram", start=9.0)) == [0, 900]

    def test_a_place_nearer_to_the_start_than_half_a_step_is_the_start(self):
        assert turns(built("rigl", every=0.001, stop=0.03)) == [0, 1, 2]
        assert turns(built("gmp", start=0.001, stop=2.0, every=1.0)) == [0, 100, 200]

    @pytest.mark.parametrize(
        ("method", "fields", "message"),
        [
            ("rigl", {"start": 2.0}, "kind periodic takes no --schedule.start; it has: --schedule.stop, --sched"),
            ("acdc", {"every": 2.0}, "kind alternating takes no --schedule.every; leave it out"),
            ("static", {"stop": 2.0}, "kind constant takes no --schedule.stop; leave it out"),
            ("gmp", {"stop": 2.0, "phases": ((5.0, 0.0), (5.0, 0.9))}, "explicit phases take no --schedule.stop"),
        ],
    )  # fmt: skip
    def test_places_that_would_do_nothing_are_refused(self, method, fields, message):
        with pytest.raises(ConfigError, match=message):
            built(method, **fields)

    @pytest.mark.parametrize("lengths", [(0.05, 0.55, 0.3, 0.1), (0.1,) * 10, (0.3, 0.3, 0.3999999999)])
    def test_phases_in_fractions_fill_the_run_though_their_sum_is_rounded(self, lengths):
        given = tuple((length, 0.9 * (index % 2)) for index, length in enumerate(lengths))
        found = built("acdc", unit="fractions", phases=given).schedule
        assert found.total_steps == 1000
        assert [phase.steps for phase in found.phases] == [round(1000 * length) for length in lengths]

    @pytest.mark.parametrize(
        ("method", "fields", "message"),
        [
            ("gmp", {"ramp": 2.0}, "kind gradual takes no --schedule.ramp; it has: .*initial-sparsity"),
            ("static", {"ramp": 2.0}, "kind constant takes no --schedule.ramp; leave it out"),
            ("gmp", {"ramp_prunings": 3}, "kind gradual takes no --schedule.ramp-prunings"),
            ("acdc", {"ramp_prunings": 3}, "--schedule.ramp-prunings is of a ramp, .*; add --schedule.ramp LENGTH"),
            ("acdc", {"initial_sparsity": 0.5}, "kind alternating takes no --schedule.initial-sparsity; leave it out"),
            ("rigl", {"initial_sparsity": 0.5, "rounds": 5}, "no --schedule.initial-sparsity, --schedule.rounds; it"),
            ("gmp", {"rounds": 5, "phases": ((5.0, 0.0), (5.0, 0.9))}, "explicit phases take no --schedule.rounds"),
            ("imp", {"rounds": 5, "kind": "oneshot"}, "kind oneshot takes no --schedule.rounds; it has: --sched"),
        ],
    )  # fmt: skip
    def test_what_a_schedule_of_one_method_would_not_use_is_refused(self, method, fields, message):
        with pytest.raises(ConfigError, match=message):
            ScheduleSettings(**fields).check_used(method)

    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            ("acdc", {"ramp": 2.0, "ramp_prunings": 3}),
            ("acdc", {"ramp": 2.0, "phases": ((5.0, 0.0), (5.0, 0.9))}),
            ("gmp", {"initial_sparsity": 0.5, "start": 1.0}),
            ("imp", {"rounds": 5}),
            ("gmp", {"rounds": 5, "kind": "rounds"}),
        ],
    )
    def test_what_it_uses_is_taken(self, method, fields):
        ScheduleSettings(**fields).check_used(method)

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_uses_all_of_every_recipe(self, recipe, name):
        find_recipe(recipe).schedule.check_used(name)

    def test_another_sparsity_beside_explicit_phases_is_refused(self):
        made = find_recipe("digits")
        explicit = ((30.0, 0.0), (10.0, 0.8), (10.0, 0.0), (10.0, 0.5))

        def check(sparsity: float) -> None:
            schedule = dataclasses.replace(made.schedule, sparsity=sparsity, phases=explicit)
            check_recipe(dataclasses.replace(made, schedule=schedule))

        check(0.9)  # the default, which need not have been asked for
        check(0.5)
        with pytest.raises(ConfigError, match=r"the last 0.5, so that --schedule.sparsity 0.8 would do nothing"):
            check(0.8)

    def test_a_published_schedule_of_the_recipe_is_acdcs_alone(self):
        recipe = find_recipe("imagenet-resnet50")
        assert recipe.schedule.paper == "imagenet-100"
        gmp = dataclasses.replace(recipe.method, name="gmp").build(recipe.schedule, steps_per_epoch=100, epochs=100)
        assert gmp.schedule.at(1100).sparsity < 0.9
        kept = dataclasses.replace(recipe.schedule, kind="alternating")
        with pytest.raises(ScheduleError, match="GMP brings no weight back"):
            dataclasses.replace(recipe.method, name="gmp").build(kept, steps_per_epoch=100, epochs=100)

    def test_a_ramp_lets_each_sparse_phase_of_acdc_begin_gently(self):
        plain = built("acdc", warmup=2, sparse=2, dense=2, final_dense=2, final_sparse=4)
        ramp = built("acdc", warmup=2, sparse=2, dense=2, final_dense=2, final_sparse=4, ramp=1, ramp_prunings=3)
        assert set(turns(plain)) < set(turns(ramp))
        first = [p.sparsity for p in ramp.schedule.phases if 200 <= p.start < 400]
        assert first == sorted(first)
        assert first[-1] == 0.9

    def test_a_ramp_goes_into_the_sparse_phases_of_published_schedules_and_of_explicit_ones(self):
        published = built("acdc", epochs=100, paper="imagenet-100", ramp=2, ramp_prunings=3).schedule
        plain = paper("imagenet-100", sparsity=0.9, steps_per_epoch=STEPS)
        assert published == ramped(plain, ramp_steps=200, prunings=3)
        assert len(published.phases) > len(plain.phases)
        explicit = built("acdc", phases=((4.0, 0.0), (6.0, 0.8)), ramp=2).schedule
        assert explicit == ramped(phases([(400, 0.0), (600, 0.8)]), ramp_steps=200, prunings=4)

    def test_a_ramp_that_does_not_fit_is_refused_by_its_flag(self):
        for fields in ({"phases": ((4.0, 0.0), (6.0, 0.8))}, {"unit": "fractions", "warmup": 0.1, "sparse": 0.1,
                       "dense": 0.1, "final_dense": 0.1, "final_sparse": 0.2}):  # fmt: skip
            with pytest.raises(ScheduleError, match=r"--schedule.ramp: a ramp of .* steps does not fit"):
                built("acdc", ramp=0.9 if "unit" in fields else 9, **fields)


class TestGroups:
    """N:M has a few sparsities alone, and a schedule is rounded to these."""

    def build(self, name: str, pattern: str, sparsity: float, **schedule: object) -> list[tuple[int, float]]:
        found = MethodSettings(name=name, pattern=pattern).build(
            ScheduleSettings(sparsity=sparsity, **schedule), steps_per_epoch=STEPS, epochs=10
        )
        return [(phase.start, phase.sparsity) for phase in found.schedule.phases]

    @pytest.mark.parametrize("pattern", ["2:4", "transposable-2:4"])
    def test_gmp_keeps_four_then_three_then_two(self, pattern):
        assert self.build("gmp", pattern, 0.5) == [(0, 0.0), (240, 0.25), (750, 0.5)]

    def test_a_ramp_of_acdc_keeps_three_before_two(self):
        lengths = {"warmup": 2, "sparse": 2, "dense": 2, "final_dense": 2, "final_sparse": 4}
        assert self.build("acdc", "2:4", 0.5, ramp=1, **lengths) == [
            (0, 0.0), (200, 0.25), (300, 0.5), (400, 0.0), (600, 0.25), (700, 0.5)
        ]  # fmt: skip
        assert self.build("acdc", "2:4", 0.5, **lengths) == [(0, 0.0), (200, 0.5), (400, 0.0), (600, 0.5)]

    def test_a_ramp_into_explicit_phases_keeps_three_before_two(self):
        given = ((4.0, 0.0), (6.0, 0.5))
        assert self.build("acdc", "2:4", 0.5, phases=given, ramp=2) == [(0, 0.0), (400, 0.25), (600, 0.5)]

    def test_imp_takes_weights_of_every_group_in_each_round(self):
        assert [at for _, at in self.build("imp", "2:4", 0.5, rounds=2)] == [0.0, 0.0, 0.25, 0.5]
        assert [at for _, at in self.build("imp", "1:4", 0.75, rounds=3)] == [0.0, 0.0, 0.25, 0.5, 0.75]

    @pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:2", 0.5)])
    def test_imp_with_more_rounds_than_groups_can_have_is_refused_with_the_flag(self, pattern, sparsity):
        with pytest.raises(ConfigError, match=f"each of 3 rounds on the way to {pattern}; .* --schedule.rounds"):
            self.build("imp", pattern, sparsity, rounds=3)

    def test_explicit_phases_and_other_patterns_are_left_as_they_are(self):
        assert self.build("gmp", "2:4", 0.9, phases=((5.0, 0.0), (5.0, 0.25))) == [(0, 0.0), (500, 0.25)]
        assert len(self.build("gmp", "4x4", 0.9)) == len(built("gmp").schedule.phases)

    @pytest.mark.parametrize("name", ["acdc", "gmp", "oneshot", "snip"])
    def test_a_sparsity_that_the_pattern_does_not_have_is_refused_with_the_flag_to_add(self, name):
        with pytest.raises(
            ConfigError, match=r"2:4 has a sparsity of 0.5, the schedule 0.9; add --schedule.sparsity 0.5"
        ):
            self.build(name, "2:4", 0.9, warmup=2, sparse=2, dense=2, final_dense=2, final_sparse=4)
