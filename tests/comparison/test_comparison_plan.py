"""Contenders and their search spaces."""

import pytest
from comparison_plans import DIGITS, plan

from sparsetwin.comparison import (
    changed,
    find_contender,
    known_labels,
)
from sparsetwin.comparison._plan import TUNING_SEED, contender_recipe
from sparsetwin.comparison._small import small_width
from sparsetwin.comparison._spaces import COMMON, knobs_of, trial_changes
from sparsetwin.errors import ConfigError
from sparsetwin.methods import METHODS
from sparsetwin.metrics import count_forward_flops
from sparsetwin.recipes import check_recipe, example_input, find_recipe, meta_model, recipe_from_plain


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
                for t in range(1, 14)
            ]
        assert drawn["acdc"] == drawn["rigl"] == drawn["dense"] == drawn["acdc+ham"]
        assert drawn["acdc"][:3] == [(0.2, 5e-4), (0.05, 1e-3), (0.1, 1.25e-4)]
        assert len(set(drawn["acdc"][:11])) == 11  # every pair but the recipe's own, which the first trial had
        assert (DIGITS.optimizer.lr, DIGITS.optimizer.weight_decay) not in drawn["acdc"]
        assert drawn["acdc"][11:] == drawn["acdc"][:2]

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
        given = {
            "strong=acdc+ham,method.ham=(400.0,0.001)": "method.ham",
            "slow=rigl,optimizer.lr=0.01": "optimizer.lr",
        }
        for text, path in given.items():
            assert path not in {knob.path for knob in knobs_of(find_contender(text))}

    def test_both_learning_rates_of_muon_are_tuned_together(self):
        contender = find_contender("acdc")
        recipe = changed(DIGITS, {"optimizer.name": "muon", "optimizer.lr": 0.004, "optimizer.muon_lr": 0.03})
        found = trial_changes(contender, recipe, trial=2, seed=1)
        assert (found["optimizer.lr"], found["optimizer.muon_lr"]) == (0.002, 0.015)

    def test_places_are_fractions_of_the_run_in_the_unit_of_the_schedule(self):
        contender = find_contender("oneshot")
        base = contender_recipe(plan("oneshot", reference="oneshot"), contender, 0.9)
        epochs = {trial_changes(contender, base, trial=trial, seed=1)["schedule.start"] for trial in range(1, 30)}
        assert epochs == {0.25 * 60, 0.5 * 60, 0.7 * 60}

    def test_a_knob_of_a_method_takes_the_place_of_the_common_one_of_its_path(self):
        contender = find_contender("topkast")
        assert COMMON[1] not in knobs_of(contender)
        base = contender_recipe(plan("topkast", reference="topkast"), contender, 0.9)
        drawn = [trial_changes(contender, base, trial=trial, seed=1) for trial in range(1, 7)]
        assert [changes["optimizer.weight_decay"] for changes in drawn] == [5e-4, 0.0, 1.25e-4] * 2
        assert [changes["optimizer.lr"] for changes in drawn[:4]] == [0.2, 0.05, 0.1, 0.025]
