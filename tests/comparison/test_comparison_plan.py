"""What a comparison consists of, and how its numbers come about."""

import math
from pathlib import Path

import pytest

from sparsetwin.comparison import (
    Plan,
    changed,
    find_contender,
    holm,
    known_labels,
    paired_difference,
    summary,
    tasks,
)
from sparsetwin.comparison._longer import lengthened
from sparsetwin.comparison._plan import TUNING_SEED, Outcome, contender_recipe
from sparsetwin.comparison._results import corrected
from sparsetwin.comparison._small import small_width
from sparsetwin.comparison._spaces import KNOBS, knobs_of, trial_changes
from sparsetwin.errors import ConfigError
from sparsetwin.methods import METHODS
from sparsetwin.metrics import count_forward_flops
from sparsetwin.recipes import check_recipe, example_input, find_recipe, meta_model, recipe_from_plain
from sparsetwin.report import Gap, MethodRow

DIGITS = find_recipe("digits")


def plan(*labels: str, **fields) -> Plan:
    usual = {"sparsities": (0.9, 0.95), "seeds": (0, 1), "recipe": DIGITS, "reference": "acdc"}
    return Plan(contenders=tuple(map(find_contender, labels)), **{**usual, **fields})


class TestStatistics:
    """Against numbers of published tables and of other programs."""

    @pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228), (31, 2.042)])
    def test_the_half_width_is_students_t_times_the_error_of_the_mean(self, count, quantile):
        values = [float(value) for value in range(count)]
        deviation = math.sqrt(sum((v - (count - 1) / 2) ** 2 for v in values) / (count - 1))
        found = summary(values)
        assert (found.mean, found.deviation) == pytest.approx(((count - 1) / 2, deviation))
        assert found.half_width == pytest.approx(quantile * deviation / math.sqrt(count), rel=3e-4)

    def test_the_paired_test_has_the_p_value_of_the_closed_form(self):
        first, second = [30.02, 29.99, 30.11, 29.97, 30.01, 29.99], [29.89, 29.93, 29.72, 29.98, 30.02, 29.98]
        found = paired_difference(first, second)
        t = 0.095 / math.sqrt(0.11875 / 5 / 6)
        angle = math.atan(t / math.sqrt(5))  # of 5 degrees of freedom there is a closed form
        within = 2 / math.pi * (angle + math.sin(angle) * (math.cos(angle) + 2 / 3 * math.cos(angle) ** 3))
        assert found.mean == pytest.approx(0.095)
        assert found.p_value == pytest.approx(1 - within, abs=1e-9)

    def test_one_value_has_no_deviation_and_one_pair_no_p_value(self):
        assert math.isnan(summary([1.0]).half_width)
        assert math.isnan(paired_difference([1.0], [2.0]).p_value)
        assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1
        with pytest.raises(ConfigError, match="equally many values, got 1 and 2"):
            paired_difference([1.0], [1.0, 2.0])
        with pytest.raises(ConfigError, match="at least one value"):
            summary([])

    def test_holm_keeps_the_order_and_never_falls_below_a_smaller_p_value(self):
        assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
        assert holm([0.6, 0.7]) == [1.0, 1.0]
        assert holm([]) == []


class TestContenders:
    def test_every_method_is_a_contender_that_can_be_built(self):
        assert set(METHODS) <= set(known_labels())
        for label in known_labels():
            recipe = contender_recipe(plan(label, reference=label), find_contender(label), 0.9)
            method = recipe.method.build(recipe.schedule, steps_per_epoch=20, epochs=recipe.train.epochs)
            assert method.schedule.total_steps == 20 * recipe.train.epochs
            if recipe.method.name != "dense":
                assert method.schedule.final_sparsity == 0.9
            assert recipe_from_plain(recipe.plain()) == recipe

    def test_a_label_of_its_own_has_changes_of_its_own(self):
        found = find_contender("strong=acdc+ham,method.ham=(400.0,0.001),optimizer.lr=0.05")
        recipe = changed(DIGITS, found.changes)
        assert (found.label, recipe.method.ham, recipe.optimizer.lr) == ("strong", (400.0, 0.001), 0.05)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("rigel", "unknown contender 'rigel'; known: .*did you mean 'rigl'"),
            ("a=rigl,schedule", "a change is FIELD=VALUE"),
            ("a/b=rigl", "a label is the name of a folder"),
            ("..=rigl", "a label is the name of a folder"),
            ("pretrained=dense", "and not 'pretrained'"),
        ],
    )
    def test_what_is_none_is_refused(self, text, message):
        with pytest.raises(ConfigError, match=message):
            find_contender(text)

    def test_a_field_that_a_recipe_lacks_is_refused_with_the_nearest(self):
        with pytest.raises(ConfigError, match=r"a recipe has no field 'optimizer.lrr'; did you mean 'lr'"):
            changed(DIGITS, {"optimizer.lrr": 1})

    @pytest.mark.parametrize("measure", ["parameters", "flops"])
    def test_the_small_dense_network_costs_what_the_sparse_one_does(self, measure):
        recipe = find_recipe("cifar10-resnet20")
        width = small_width(recipe, sparsity=0.9, measure=measure)
        small = meta_model(changed(recipe, {"model.options.width": width}))
        if measure == "parameters":
            found = sum(p.numel() for p in small.parameters())
            goal = 272_474 - round(0.9 * 270_896)
        else:
            found = count_forward_flops(small, example_input(recipe.dataset)).total()
            goal = 0.1 * count_forward_flops(meta_model(recipe), example_input(recipe.dataset)).total()
        assert found == pytest.approx(goal, rel=0.15)  # channels are whole numbers


class TestSpaces:
    """What is tuned."""

    @pytest.mark.parametrize("sparsity", [0.5, 0.9])
    @pytest.mark.parametrize("label", known_labels())
    def test_every_trial_of_every_contender_can_be_trained(self, label, sparsity):
        contender = find_contender(label)
        base = contender_recipe(plan(label, reference=label, trials=1), contender, sparsity)
        for trial in range(8):
            check_recipe(changed(base, trial_changes(contender, base, trial=trial, seed=1)))

    @pytest.mark.parametrize("label", METHODS)
    def test_all_values_of_all_knobs_can_be_had_together_and_are_drawn(self, label):
        contender = find_contender(label)
        base = contender_recipe(plan(label, reference=label), contender, 0.9)
        drawn = [trial_changes(contender, base, trial=trial, seed=1) for trial in range(1, 60)]
        for knob in knobs_of(contender):
            assert len({str(changes[knob.path]) for changes in drawn}) == len(knob.values)

    def test_learning_rates_and_weight_decays_are_tried_in_the_same_order_by_all(self):
        common = ("optimizer.lr", "optimizer.weight_decay")
        drawn = {}
        for label in ("acdc", "rigl", "dense", "acdc+ham"):
            contender = find_contender(label)
            base = contender_recipe(plan(label, reference=label), contender, None if contender.is_dense else 0.9)
            drawn[label] = [
                tuple(trial_changes(contender, base, trial=t, seed=TUNING_SEED)[name] for name in common)
                for t in range(1, 13)
            ]
        assert drawn["acdc"] == drawn["rigl"] == drawn["dense"] == drawn["acdc+ham"]
        assert drawn["acdc"][:3] == [(0.2, 5e-4), (0.05, 1e-3), (0.1, 1.25e-4)]
        assert len(set(drawn["acdc"])) == 12  # every pair

    def test_values_that_the_sparsity_does_not_allow_are_not_drawn(self):
        contender = find_contender("topkast")
        base = contender_recipe(plan("topkast", reference="topkast"), contender, 0.7)
        drawn = {
            trial_changes(contender, base, trial=trial, seed=1)["method.options.backward_sparsity"]
            for trial in range(1, 30)
        }
        assert drawn == {0.0, 0.5}

    def test_what_a_contender_fixes_is_not_tuned(self):
        assert "schedule.start" not in {knob.path for knob in knobs_of(find_contender("gmp-pretrained"))}
        assert "method.ham" in {knob.path for knob in knobs_of(find_contender("acdc+ham"))}

    def test_places_are_fractions_of_the_run_in_the_unit_of_the_schedule(self):
        contender = find_contender("oneshot")
        base = contender_recipe(plan("oneshot", reference="oneshot"), contender, 0.9)
        epochs = {trial_changes(contender, base, trial=trial, seed=1)["schedule.start"] for trial in range(1, 30)}
        assert epochs == {0.25 * 60, 0.5 * 60, 0.7 * 60}

    def test_every_method_has_its_own_space_or_none_on_purpose(self):
        assert set(KNOBS) == set(METHODS)


class TestTasks:
    def test_dense_runs_serve_all_sparsities(self):
        folders = [str(task.folder) for task in tasks(plan("acdc", "dense"), {})]
        assert folders == [
            "runs/acdc/0.9/seed-0", "runs/acdc/0.9/seed-1", "runs/acdc/0.95/seed-0", "runs/acdc/0.95/seed-1",
            "runs/dense/dense/seed-0", "runs/dense/dense/seed-1",
        ]  # fmt: skip

    def test_runs_wait_for_the_trials_and_have_the_settings_of_the_best(self):
        asked = plan("gmp", sparsities=(0.9,), seeds=(0,), trials=3, reference="gmp")
        trials = list(tasks(asked, {}))
        assert [task.table for task in trials] == ["trials"] * 3
        assert trials[0].recipe.optimizer == DIGITS.optimizer
        assert len({task.recipe.seed for task in trials}) == 1
        outcomes = {
            task.folder: Outcome(holdout=score, training_flops=1)
            for task, score in zip(trials, (0.5, math.nan, 0.7), strict=True)
        }
        run = list(tasks(asked, outcomes))[-1]
        assert run.table == "epochs"
        assert [task.recipe.train.test for task in (*trials, run)] == [False, False, False, True]
        assert run.recipe == changed(trials[2].recipe, {"seed": 0, "train.test": True})

    def test_every_contender_has_equally_many_trials_from_a_space_of_its_own(self):
        asked = plan("acdc", "gmp", trials=5)
        counts = {}
        for task in tasks(asked, {}):
            counts[task.label, task.sparsity] = counts.get((task.label, task.sparsity), 0) + 1
        assert set(counts.values()) == {5}
        contender = find_contender("gmp")
        assert {"optimizer.lr", "schedule.start"} <= {knob.path for knob in knobs_of(contender)}
        first = trial_changes(contender, DIGITS, trial=3, seed=1)
        assert first == trial_changes(contender, DIGITS, trial=3, seed=1)
        assert first != trial_changes(contender, DIGITS, trial=4, seed=1)

    def test_trials_that_look_for_a_sparsity_come_one_after_the_other(self):
        asked = plan("str-learned", sparsities=(0.9,), seeds=(0,), trials=3, reference="str-learned")
        outcomes: dict[Path, Outcome] = {}
        for trial, (sparsity, holdout) in enumerate([(0.6, 0.95), (0.93, 0.7), (0.897, 0.9)]):
            due = [task for task in tasks(asked, outcomes) if task.folder not in outcomes]
            assert [str(task.folder) for task in due] == [f"trials/str-learned/0.9/trial-{trial}"]
            assert due[0].recipe.seed == TUNING_SEED
            outcomes[due[0].folder] = Outcome(holdout=holdout, training_flops=1, sparsity=sparsity)
        (run,) = [task for task in tasks(asked, outcomes) if task.table == "epochs"]
        assert run.recipe.method.options == due[0].recipe.method.options  # the last one came close
        initial = [task.recipe.method.options["initial"] for task in tasks(asked, outcomes)]
        assert initial[0] < initial[2] < initial[1]

    def test_cheaper_methods_run_again_as_long_as_the_flops_of_the_reference_last(self):
        asked = plan("acdc", "static", "set", sparsities=(0.9,), seeds=(0,), equal_flops=("static",))
        outcomes = {
            Path("runs/acdc/0.9/seed-0"): Outcome(holdout=0.9, training_flops=600),
            Path("runs/static/0.9/seed-0"): Outcome(holdout=0.9, training_flops=100),
            Path("runs/set/0.9/seed-0"): Outcome(holdout=0.9, training_flops=100),
        }
        longer = [task for task in tasks(asked, outcomes) if task.table == "flops"]
        assert [(task.label, task.recipe.train.epochs) for task in longer] == [("static", 6 * DIGITS.train.epochs)]

    def test_lengths_in_epochs_grow_with_a_longer_run(self):
        recipe = changed(DIGITS, {"schedule.start": 6.0, "learning_rate.milestones": (30.0, 50.0)})
        longer = lengthened(recipe, 2 * DIGITS.train.epochs)
        assert (longer.schedule.start, longer.learning_rate.milestones) == (12.0, (60.0, 100.0))

    def test_every_length_of_a_longer_run_is_stretched(self):
        for name in ("digits", "imagenet-resnet50", "cifar100-wrn28-10", "charlm-gpt"):
            recipe = find_recipe(name)
            longer = lengthened(recipe, 3 * recipe.train.epochs)
            short, long = (
                r.method.build(r.schedule, steps_per_epoch=10, epochs=r.train.epochs).schedule for r in (recipe, longer)
            )
            assert [(3 * phase.start, 3 * phase.stop, phase.sparsity) for phase in short.phases] == [
                (phase.start, phase.stop, phase.sparsity) for phase in long.phases
            ]
            assert longer.learning_rate.milestones == tuple(3 * m for m in recipe.learning_rate.milestones)

    def test_lengths_in_steps_and_explicit_phases_are_stretched_to_whole_steps(self):
        recipe = changed(DIGITS, {"schedule.unit": "steps", "schedule.phases": ((333, 0.0), (747, 0.9))})
        longer = lengthened(recipe, 66)  # 1188 steps of 18
        assert longer.schedule.phases == ((366, 0.0), (822, 0.9))
        assert longer.schedule.build(steps_per_epoch=18, epochs=66).total_steps == 1188

    def test_pretraining_is_part_of_equal_flops(self):
        asked = plan("acdc", "oneshot-pretrained", sparsities=(0.9,), seeds=(0,), equal_flops=("oneshot-pretrained",))
        outcomes = {
            Path("runs/pretrained/seed-0"): Outcome(holdout=0.9, training_flops=300),
            Path("runs/acdc/0.9/seed-0"): Outcome(holdout=0.9, training_flops=600),
            Path("runs/oneshot-pretrained/0.9/seed-0"): Outcome(holdout=0.9, training_flops=100),
        }
        longer = [task for task in tasks(asked, outcomes) if task.table == "flops"]
        assert [task.recipe.train.epochs for task in longer] == [3 * DIGITS.train.epochs]
        assert longer[0].pretrained == Path("runs/pretrained/seed-0")

    @pytest.mark.parametrize("label", ["acdc", "dense", "rigl"])
    def test_equal_flops_of_what_is_not_beside_the_reference_are_refused(self, label):
        with pytest.raises(ConfigError, match=rf"sparsity beside acdc, not for {label}; these are: static$"):
            plan("acdc", "static", "dense", equal_flops=(label,))

    @pytest.mark.parametrize(
        ("changes", "unlike"),
        [
            ({}, []),
            ({"seeds": (0, 1, 2)}, []),
            ({"seeds": (2, 1, 0), "sparsities": (0.95, 0.8, 0.9)}, []),
            ({"equal_flops": ("gmp", "static")}, []),
            ({"seeds": (0,)}, ["seeds"]),
            ({"sparsities": (0.9,), "equal_flops": ()}, ["equal_flops", "sparsities"]),
            ({"trials": 1}, ["trials"]),
            ({"reference": "static", "equal_flops": ("gmp",)}, ["equal_flops", "reference"]),
            ({"recipe": changed(DIGITS, {"optimizer.lr": 1})}, ["recipe"]),
        ],
    )
    def test_a_plan_may_grow_and_nothing_else(self, changes, unlike):
        earlier = plan("acdc", "static", equal_flops=("static",)).plain()
        usual = {"equal_flops": ("static",)}
        assert plan("gmp", "acdc", "static", **{**usual, **changes}).unlike(earlier) == unlike
        assert plan("acdc", "gmp", "mine=rigl", equal_flops=()).unlike(earlier) == ["contenders", "equal_flops"]
        other = plan("acdc", "static=static,optimizer.lr=1", equal_flops=("static",))
        assert other.unlike(earlier) == ["contenders"]

    def test_a_dense_reference_stands_beside_every_sparsity(self):
        asked = plan("dense", "static", sparsities=(0.9,), seeds=(0,), equal_flops=("static",), reference="dense")
        outcomes = {
            Path("runs/dense/dense/seed-0"): Outcome(holdout=0.9, training_flops=1000),
            Path("runs/static/0.9/seed-0"): Outcome(holdout=0.9, training_flops=100),
        }
        longer = [task for task in tasks(asked, outcomes) if task.table == "flops"]
        assert [(task.label, task.recipe.train.epochs) for task in longer] == [("static", 10 * DIGITS.train.epochs)]

    def test_trials_of_what_needs_a_trained_network_have_one_of_their_own_seed(self):
        asked = plan("woodfisher", sparsities=(0.9,), seeds=(0,), trials=2, reference="woodfisher")
        first = list(tasks(asked, {}))
        assert [str(task.folder) for task in first] == ["runs/pretrained/seed-1000", "runs/pretrained/seed-0"]
        outcomes = {task.folder: Outcome(holdout=0.9, training_flops=5) for task in first}
        trials = [task for task in tasks(asked, outcomes) if task.table == "trials"]
        assert {(task.recipe.seed, task.pretrained) for task in trials} == {(1000, Path("runs/pretrained/seed-1000"))}

    def test_what_needs_a_trained_network_is_not_tried_where_that_failed(self):
        asked = plan("acdc", "gmp-pretrained", sparsities=(0.9,), seeds=(0, 1))
        outcomes = {
            Path("runs/pretrained/seed-0"): Outcome(holdout=math.nan, training_flops=0),
            Path("runs/pretrained/seed-1"): Outcome(holdout=0.9, training_flops=5),
        }
        found = [str(task.folder) for task in tasks(asked, outcomes) if task.label == "gmp-pretrained"]
        assert found == ["runs/gmp-pretrained/0.9/seed-1"]

    @pytest.mark.parametrize("name", ["digits", "imagenet-resnet50", "cifar100-wrn28-10", "cifar10-resnet20"])
    def test_every_contender_can_be_trained_with_every_recipe_of_images(self, name):
        narrows = find_recipe(name).model.name in ("digits_cnn", "resnet20")
        labels = [label for label in known_labels() if narrows or not label.startswith("small")]
        plan(*labels, recipe=find_recipe(name), sparsities=(0.95,)).check()

    def test_a_contender_that_cannot_be_trained_is_named_before_anything_is(self):
        with pytest.raises(ConfigError, match=r"mine at sparsity 0.9: rigl has no field 'drop'"):
            plan("acdc", "mine=rigl,method.options.drop=1").check()
        with pytest.raises(ConfigError, match=r"odd at sparsity 0.9: optimizer.lr cannot be 'fast'"):
            plan("acdc", "odd=rigl,optimizer.lr=fast").check()
        with pytest.raises(
            ConfigError, match=r"small-dense-flops at sparsity 0.9: gpt has no option width that is a factor"
        ):
            plan("acdc", "small-dense-flops", recipe=find_recipe("charlm-gpt")).check()

    def test_what_is_said_of_sparse_methods_is_no_matter_for_dense_ones(self):
        recipe = changed(DIGITS, {"method.distribution": "uniform"})
        asked = plan("acdc", "dense", "oneshot-pretrained", "small-dense-parameters", recipe=recipe)
        asked.check()
        dense = [task.recipe.method for task in tasks(asked, {}) if task.recipe.method.name == "dense"]
        assert len(dense) == 2 + 2 + 4  # before training, as a contender, and narrower at two sparsities
        assert {method.distribution for method in dense} == {None}

    def test_what_needs_a_trained_network_waits_for_it(self):
        asked = plan("gmp-pretrained", sparsities=(0.9,), seeds=(0,), reference="gmp-pretrained")
        first = list(tasks(asked, {}))
        assert [str(task.folder) for task in first] == ["runs/pretrained/seed-0"]
        assert first[0].recipe.method.name == "dense"
        second = list(tasks(asked, {first[0].folder: Outcome(holdout=0.9, training_flops=5)}))
        assert second[-1].pretrained == first[0].folder

    @pytest.mark.parametrize(
        ("labels", "fields", "message"),
        [
            (("acdc", "acdc"), {}, "contenders of different labels"),
            (("acdc",), {"seeds": ()}, "at least one sparsity and one seed"),
            (("acdc",), {"sparsities": (1.5,)}, "sparsities are fractions between 0 and 1"),
            (("acdc",), {"sparsities": (0.9, 0.9)}, "the sparsities of a comparison differ from each other"),
            (("acdc",), {"seeds": (1, 1)}, "the seeds of a comparison differ from each other"),
            (("gmp",), {}, "the others are compared with acdc, which is not among: gmp"),
            (("acdc",), {"trials": 2, "seeds": (1000,)}, "the seed 1000 is that of the trials"),
            (("acdc",), {"trials": 2, "recipe": changed(DIGITS, {"dataset.holdout": 0.0})},
             "settings are chosen on a hold-out, but the recipe has none"),
            (("acdc",), {"trials": 2, "recipe": changed(DIGITS, {"schedule.unit": "steps"})}, "use epochs"),
        ],
    )  # fmt: skip
    def test_plans_that_cannot_be(self, labels, fields, message):
        with pytest.raises(ConfigError, match=message):
            plan(*labels, **fields)


class TestCorrection:
    """p-values over all tables of a comparison."""

    def test_every_difference_counts_and_what_stands_in_both_tables_counts_once(self):
        def row(label: str, *, reference: float | None, dense: float | None) -> MethodRow:
            to_reference, to_dense = (
                None if p is None else Gap(pairs=5, difference=0.01, half_width=0.01, p_value=p)
                for p in (reference, dense)
            )
            return MethodRow(
                label=label, sparsity=0.9, achieved_sparsity=0.9, seeds=5, accuracy=0.7, deviation=0.1, half_width=0.1,
                to_reference=to_reference, to_dense=to_dense, training_share=1, inference_share=1, seconds=1, failed=0,
            )  # fmt: skip

        acdc = row("acdc", reference=None, dense=0.01)
        tables = {"epochs": [acdc, row("rigl", reference=0.02, dense=0.02)],
                  "flops": [acdc, row("rigl", reference=0.04, dense=math.nan)]}  # fmt: skip
        found = corrected(tables)
        # four differences: 0.01 * 4, then 0.02 * 3 twice (never falling), then 0.04 * 1
        assert [r.to_dense.p_value for r in found["epochs"]] == pytest.approx([0.04, 0.06])
        assert found["epochs"][1].to_reference.p_value == pytest.approx(0.06)
        assert found["flops"][0] == found["epochs"][0]
        assert found["flops"][1].to_reference.p_value == pytest.approx(0.06)
        assert math.isnan(found["flops"][1].to_dense.p_value)
