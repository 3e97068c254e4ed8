"""Which runs a comparison consists of, and how they depend on each other."""

import math
from pathlib import Path

import pytest
from comparison_plans import DIGITS, plan

from sparsetwin.comparison import (
    changed,
    find_contender,
    known_labels,
    tasks,
)
from sparsetwin.comparison._longer import in_whole_rounds, lengthened
from sparsetwin.comparison._plan import TUNING_SEED, Outcome
from sparsetwin.comparison._spaces import knobs_of, trial_changes
from sparsetwin.errors import ConfigError
from sparsetwin.recipes import find_recipe


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

    def test_whether_a_method_runs_longer_is_decided_once_for_all_seeds(self):
        asked = plan("acdc", "static", sparsities=(0.9,), seeds=(3, 0, 1), equal_flops=("static",))
        flops = {"acdc": {3: 0, 0: 300, 1: 100}, "static": {3: 100, 0: 100, 1: 100}}
        outcomes = {
            Path(f"runs/{label}/0.9/seed-{seed}"): Outcome(holdout=0.9, training_flops=spent)
            for label, seeds in flops.items() for seed, spent in seeds.items()
        }  # fmt: skip
        longer = [task for task in tasks(asked, outcomes) if task.table == "flops"]
        # the first seed that both ended; the reference failed on seed 3 and costs as much as static on seed 1
        assert [(task.recipe.seed, task.recipe.train.epochs) for task in longer] == [
            (seed, 3 * DIGITS.train.epochs) for seed in (3, 0, 1)
        ]
        outcomes.pop(Path("runs/acdc/0.9/seed-3"))
        assert not [task for task in tasks(asked, outcomes) if task.table == "flops"]  # not known yet

    def test_a_failed_start_decides_nothing_about_longer_runs(self):
        asked = plan("acdc", "gmp-pretrained", sparsities=(0.9,), seeds=(0, 1), equal_flops=("gmp-pretrained",))
        flops = {"pretrained/dense/seed-0": 0, "pretrained/dense/seed-1": 100, "acdc/0.9/seed-0": 900,
                 "acdc/0.9/seed-1": 300, "gmp-pretrained/0.9/seed-1": 50}  # fmt: skip
        outcomes = {
            Path("runs") / name: Outcome(holdout=0.9, training_flops=spent) for name, spent in flops.items()
        }  # fmt: skip
        longer = [task for task in tasks(asked, outcomes) if task.table == "flops"]
        assert [(task.recipe.seed, task.recipe.train.epochs) for task in longer] == [(1, 4 * DIGITS.train.epochs)]

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"schedule.every": 0.5},
            {"schedule.unit": "fractions", "schedule.sparsity": 0.9},
            {"schedule.unit": "fractions", "schedule.every": 0.02},
            {"schedule.unit": "steps", "schedule.every": 7, "schedule.stop": 500},
        ],
    )
    def test_a_longer_run_updates_its_masks_as_often(self, changes):
        recipe = changed(DIGITS, {**changes, "method.name": "rigl"})
        recipes = (recipe, lengthened(recipe, 3 * recipe.train.epochs))
        short, long = (
            r.method.build(r.schedule, steps_per_epoch=20, epochs=r.train.epochs).schedule.phases for r in recipes
        )
        assert long[0].steps == short[0].steps
        assert len(long) == pytest.approx(3 * len(short), abs=3)

    def test_gradual_pruning_goes_on_as_often_in_a_longer_run(self):
        recipe = changed(DIGITS, {"method.name": "gmp", "schedule.every": 0.5})
        assert lengthened(recipe, 120).schedule.every == 0.5

    def test_quantization_begins_in_proportion(self):
        recipe = changed(DIGITS, {"method.qat": True, "method.qat_start": 45.0})
        assert lengthened(recipe, 120).method.qat_start == 90.0
        fractions = changed(DIGITS, {"schedule.unit": "fractions", "method.name": "imp", "method.qat": True})
        whole = in_whole_rounds(changed(fractions, {"method.qat_start": 0.8}))
        assert (whole.schedule.unit, whole.method.qat_start) == ("epochs", 0.8 * 60 * 4)

    def test_each_whole_round_warms_up_as_long_as_the_others_do(self):
        whole = in_whole_rounds(changed(DIGITS, {"method.name": "imp", "learning_rate.warmup_epochs": 5.0}))
        method = whole.method.build(whole.schedule, steps_per_epoch=10, epochs=whole.train.epochs)
        squeezed = method.learning_rate_steps / method.schedule.total_steps
        assert whole.learning_rate.warmup_epochs * squeezed == pytest.approx(5.0, rel=0.05)

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

    def test_the_ramp_into_a_published_schedule_is_stretched_with_its_phases(self):
        recipe = changed(find_recipe("cifar100-wrn28-10"), {"schedule.ramp": 1.0})
        short, long = (
            r.method.build(r.schedule, steps_per_epoch=30, epochs=r.train.epochs).schedule
            for r in (recipe, lengthened(recipe, 400))
        )
        assert [(2 * phase.start, phase.sparsity) for phase in short.phases] == [
            (phase.start, phase.sparsity) for phase in long.phases
        ]
        assert len(short.phases) > 12

    def test_lengths_in_steps_and_explicit_phases_are_stretched_to_whole_steps(self):
        recipe = changed(DIGITS, {"schedule.unit": "steps", "schedule.phases": ((333, 0.0), (747, 0.9))})
        longer = lengthened(recipe, 66)  # 1188 steps of 18
        assert longer.schedule.phases == ((366, 0.0), (822, 0.9))
        assert longer.schedule.build(steps_per_epoch=18, epochs=66).total_steps == 1188

    def test_pretraining_is_part_of_equal_flops(self):
        asked = plan("acdc", "oneshot-pretrained", sparsities=(0.9,), seeds=(0,), equal_flops=("oneshot-pretrained",))
        outcomes = {
            Path("runs/pretrained/dense/seed-0"): Outcome(holdout=0.9, training_flops=300),
            Path("runs/acdc/0.9/seed-0"): Outcome(holdout=0.9, training_flops=600),
            Path("runs/oneshot-pretrained/0.9/seed-0"): Outcome(holdout=0.9, training_flops=100),
        }
        longer = [task for task in tasks(asked, outcomes) if task.table == "flops"]
        assert [task.recipe.train.epochs for task in longer] == [3 * DIGITS.train.epochs]
        assert longer[0].pretrained == Path("runs/pretrained/dense/seed-0")

    def test_what_the_reference_begins_from_is_part_of_equal_flops(self):
        labels = ("gmp-pretrained", "oneshot-pretrained", "static")
        asked = plan(*labels, sparsities=(0.9,), seeds=(0,), equal_flops=labels[1:], reference="gmp-pretrained")
        flops = {"pretrained/dense": 300, "gmp-pretrained/0.9": 200, "oneshot-pretrained/0.9": 100, "static/0.9": 50}
        outcomes = {
            Path("runs") / name / "seed-0": Outcome(holdout=0.9, training_flops=spent) for name, spent in flops.items()
        }
        longer = {task.label: task.recipe.train.epochs for task in tasks(asked, outcomes) if task.table == "flops"}
        assert longer == {"oneshot-pretrained": 2 * DIGITS.train.epochs, "static": 10 * DIGITS.train.epochs}

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
        earlier["contenders"] = [{**contender, "aim": None, "later": False} for contender in earlier["contenders"]]
        assert plan("gmp", "acdc", "static", **{**usual, **changes}).unlike(earlier) == unlike
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

    @pytest.mark.parametrize(("labels", "name"), [(("woodfisher",), "pretrained"), (("woodfisher", "dense"), "dense")])
    def test_trained_networks_to_begin_from_are_tuned_as_dense_ones_and_are_these_where_they_are_compared(
        self, labels, name
    ):
        asked = plan(*labels, sparsities=(0.9,), seeds=(0,), trials=2, reference="woodfisher")
        tuning = list(tasks(asked, {}))
        folders = [f"trials/{name}/dense/trial-0", f"trials/{name}/dense/trial-1"]
        assert [str(task.folder) for task in tuning] == folders
        outcomes = {task.folder: Outcome(holdout=0.8 + i / 10, training_flops=5) for i, task in enumerate(tuning)}
        trained, *trials = (task for task in tasks(asked, outcomes) if task.folder not in outcomes)
        assert str(trained.folder) == f"runs/{name}/dense/seed-0"
        assert trained.recipe.optimizer == tuning[1].recipe.optimizer != tuning[0].recipe.optimizer
        assert trained.recipe.train.test == (name == "dense")
        assert {(task.label, task.recipe.seed, task.pretrained) for task in trials} == {
            ("woodfisher", TUNING_SEED, tuning[1].folder)
        }
        outcomes |= {task.folder: Outcome(holdout=0.9, training_flops=5) for task in (trained, *trials)}
        (run,) = (task for task in tasks(asked, outcomes) if task.folder not in outcomes)
        assert (run.label, run.pretrained) == ("woodfisher", trained.folder)

    def test_rounds_are_whole_where_asked_for(self):
        asked = plan("acdc", "imp", "imp-whole", sparsities=(0.9,), seeds=(0,))
        built = {
            task.label: task.recipe.method.build(
                task.recipe.schedule, steps_per_epoch=10, epochs=task.recipe.train.epochs
            )
            for task in tasks(asked, {})
        }
        epochs = DIGITS.train.epochs
        shared, whole = built["imp"], built["imp-whole"]
        assert shared.schedule.total_steps == 10 * epochs
        assert whole.schedule.total_steps == 4 * 10 * epochs  # training and three rounds, with what they go back to
        assert whole.schedule.phases[-1].steps == pytest.approx(10 * epochs, rel=0.02)
        assert shared.rewind_step == pytest.approx(whole.rewind_step, abs=4)  # five hundredths of the recipe's epochs
        assert whole.rewind_step == pytest.approx(0.05 * 10 * epochs, abs=4)

    def test_a_given_threshold_is_not_looked_for(self):
        asked = plan("mine=str,method.options.initial=-3.0", sparsities=(0.9,), seeds=(0,), reference="mine")
        (run,) = tasks(asked, {})
        assert run.recipe.method.options == {"exact_final": True, "initial": -3.0}

    def test_str_is_cut_after_trials_that_are_not(self):
        asked = plan("str", sparsities=(0.9,), seeds=(0,), trials=1, reference="str")
        (trial,) = tasks(asked, {})
        assert trial.recipe.method.options == {"exact_final": False, "initial": -4.0}
        outcome = Outcome(holdout=0.9, training_flops=1, sparsity=0.9)
        run = list(tasks(asked, {trial.folder: outcome}))[-1]
        assert run.recipe.method.options == {"exact_final": True, "initial": -4.0}

    def test_what_needs_a_trained_network_is_not_tried_where_that_failed(self):
        asked = plan("acdc", "gmp-pretrained", sparsities=(0.9,), seeds=(0, 1))
        outcomes = {
            Path("runs/pretrained/dense/seed-0"): Outcome(holdout=math.nan, training_flops=0),
            Path("runs/pretrained/dense/seed-1"): Outcome(holdout=0.9, training_flops=5),
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

    def test_what_is_not_tested_is_not_compared(self):
        with pytest.raises(ConfigError, match=r"acdc at sparsity 0.9: methods are compared by test accuracy"):
            plan("acdc", recipe=changed(DIGITS, {"train.test": False})).check()
        with pytest.raises(ConfigError, match=r"mine at sparsity 0.9: methods are compared by test accuracy"):
            plan("acdc", "mine=rigl,train.test=False").check()

    def test_what_is_said_of_sparse_methods_is_no_matter_for_dense_ones(self):
        recipe = changed(DIGITS, {"method.distribution": "uniform"})
        asked = plan("acdc", "dense", "oneshot-pretrained", "small-dense-parameters", recipe=recipe)
        asked.check()
        dense = [task.recipe.method for task in tasks(asked, {}) if task.recipe.method.name == "dense"]
        assert len(dense) == 2 + 4  # as a contender, which others begin from, and narrower at two sparsities
        assert {method.distribution for method in dense} == {None}

    def test_what_needs_a_trained_network_waits_for_it(self):
        asked = plan("gmp-pretrained", sparsities=(0.9,), seeds=(0,), reference="gmp-pretrained")
        first = list(tasks(asked, {}))
        assert [str(task.folder) for task in first] == ["runs/pretrained/dense/seed-0"]
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
            (("acdc", "g=gmp,schedule.unit=steps"), {"trials": 2}, "the schedule of g in steps"),
        ],
    )  # fmt: skip
    def test_plans_that_cannot_be(self, labels, fields, message):
        with pytest.raises(ConfigError, match=message):
            plan(*labels, **fields)
