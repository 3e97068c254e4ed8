"""Every method from a recipe: its fields by their short names, and what it leaves."""

import dataclasses
import json

import pytest
import torch

import sparsetwin as st
from sparsetwin.distributions import PerLayer
from sparsetwin.errors import ConfigError, TargetError
from sparsetwin.methods import METHODS, Method
from sparsetwin.patterns import NM, Block, Channel, Unstructured
from sparsetwin.recipes import (
    MethodSettings,
    Recipe,
    ScheduleSettings,
    build_run,
    check_recipe,
    describe,
    find_recipe,
    leaves_dense_half,
    recipe_from_plain,
)
from sparsetwin.recipes._methods import pattern_named
from sparsetwin.training import RunFolder

STEPS = 100  # of an epoch
LAYERS = {"conv1": 0.3, "conv2": 0.7, "conv3": 0.8, "fc": 0.5}


class TestFields:
    def build(self, name: str = "acdc", **fields: object) -> Method:
        return MethodSettings(name=name, **fields).build(
            ScheduleSettings(phases=((5.0, 0.0), (5.0, 0.5))) if name == "acdc" else ScheduleSettings(),
            steps_per_epoch=STEPS,
            epochs=10,
        )

    def test_what_is_not_given_is_as_the_method_has_it(self):
        for name in METHODS:
            found = self.build(name)
            assert found == METHODS[name](schedule=found.schedule)

    def test_distribution_score_reset_and_least_number(self):
        found = self.build(distribution="uniform", score="movement", reset="none", minimum_kept=3)
        assert isinstance(found, st.ACDC)
        assert (found.distribution, found.score, found.reset, found.minimum_kept) == (
            st.Uniform(),
            "movement",
            "none",
            3,
        )

    def test_a_sparsity_for_each_layer(self):
        found = self.build("static", per_layer={"conv1": 0.5, "re:conv[23]": 0.9, "fc": 0.8})
        assert found.distribution == PerLayer({"conv1": 0.5, "re:conv[23]": 0.9, "fc": 0.8})  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"--method.distribution or --method.per-layer, not both"):
            self.build(distribution="uniform", per_layer={"fc": 0.5})

    def digits(self, name: str, **schedule: object) -> Recipe:
        made = find_recipe("digits")
        return dataclasses.replace(
            made,
            method=MethodSettings(name=name, per_layer=LAYERS),
            schedule=dataclasses.replace(made.schedule, **schedule),
            train=dataclasses.replace(made.train, dense_finetune=False),
        )

    @pytest.mark.parametrize("name", ["acdc", "gmp", "static", "imp", "cram"])
    def test_a_schedule_that_ends_elsewhere_than_the_layers_is_refused_with_the_flag_to_add(self, name):
        with pytest.raises(
            ConfigError, match=r"0.761240751 together, the schedule 0.9, .* --schedule.sparsity 0.7612407"
        ):
            check_recipe(self.digits(name))
        check_recipe(self.digits(name, sparsity=0.761240751))
        if name == "gmp":
            with pytest.raises(ConfigError, match=r"the schedule 0.5, .* of --schedule.phases have 0.761240751, or"):
                check_recipe(self.digits(name, phases=((30.0, 0.0), (30.0, 0.5))))

    def test_layers_have_their_own_sparsities_at_the_one_that_is_told(self):
        method = self.digits("gmp", sparsity=0.761240751)
        shapes = {"conv1": (32, 1, 3, 3), "conv2": (64, 32, 3, 3), "conv3": (64, 64, 3, 3), "fc": (10, 64)}
        found = method.method.build(method.schedule, steps_per_epoch=STEPS, epochs=60)
        budgets = found.distribution.budgets(shapes, found.schedule.final_sparsity)  # type: ignore[attr-defined]
        assert [budget.kept for budget in budgets] == [202, 5529, 7373, 320]
        assert found.schedule.final_sparsity == pytest.approx(
            (288 * 0.3 + 18432 * 0.7 + 36864 * 0.8 + 640 * 0.5) / 56224, abs=1e-9
        )

    def test_a_run_that_an_earlier_release_began_with_scaled_layers_can_go_on(self, tmp_path):
        recipe, folder = self.digits("static"), RunFolder(tmp_path / "run")
        folder.create(describe(recipe, name="digits", data=None, command="", device=torch.device("cpu")))
        with pytest.raises(ConfigError, match="to which theirs would be scaled"):
            build_run(recipe, folder, data=None)
        folder.checkpoints.mkdir(exist_ok=True)
        (folder.checkpoints / "step-18.pt").touch()
        assert build_run(recipe, folder, data=None).parts.method.schedule.final_sparsity == 0.9

    def test_layers_that_match_nothing_are_told_before_any_data_are_read(self):
        made = self.digits("static")
        wrong = dataclasses.replace(made.method, per_layer={**LAYERS, "conv4": 0.5})
        with pytest.raises(TargetError, match="'conv4' matches none of the layers"):
            check_recipe(dataclasses.replace(made, method=wrong))

    def test_ham_and_options(self):
        found = self.build("rigl", ham=(200.0, 1e-3), options={"drop_fraction": 0.5})
        assert found.ham == st.HAM(alpha=200.0, beta=1e-3)
        assert found.drop_fraction == 0.5  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("name", "fields", "message"),
        [
            ("acdcc", {}, "unknown method 'acdcc'; known: .*did you mean 'acdc'"),
            ("rigl", {"options": {"drop": 0.5}}, "rigl has no field 'drop'; it has: .*drop_fraction"),
            ("rigl", {"score": "movement"}, "rigl has no field 'score'"),
            ("static", {"score": "random", "options": {"score": "random"}}, r"score is given twice: as --method.score"),
            ("rigl", {"options": {"drop_fraction": 2}}, r"drop_fraction is a fraction of kept weights in \[0, 1\]"),
            ("acdc", {"pattern": "2x"}, "a pattern is unstructured, N:M, transposable-N:M, RxC or channel, got '2x'"),
        ],
    )  # fmt: skip
    def test_what_a_method_lacks_is_refused_by_name(self, name, fields, message):
        with pytest.raises(ConfigError, match=message):
            self.build(name, **fields)

    @pytest.mark.parametrize(
        ("name", "option", "message"),
        [
            ("rigl", {"drop_fraction": "abc"}, "drop_fraction: expected float, got 'abc'"),
            ("rigl", {"drop_fraction": True}, "drop_fraction: expected float, got True"),
            ("rigl", {"decay": "linear"}, "decay: expected one of cosine, constant, got 'linear'"),
            ("acdc", {"score": 5}, "score: expected str, got 5"),
            ("acdc", {"minimum_kept": 1.5}, "minimum_kept: expected int, got 1.5"),
            ("acdc", {"ham": 3}, "ham: expected HAM, got 3; give it as --method.ham"),
            ("acdc", {"pattern": "2:4"}, "pattern: expected Unstructured or .*; give it as --method.pattern"),
            ("granet", {"initial_distribution": "uniform"}, "expected Global or .*; only Python code can give one"),
            ("cram", {"sparsities": 0.5}, "sparsities: expected tuple or null, got 0.5"),
            ("cram", {"sparsities": ("a",)}, "sparsities: expected tuple or null, got"),
            ("st3", {"sigma": "yes"}, "sigma: expected bool, got 'yes'"),
        ],
    )
    def test_an_option_of_the_wrong_type_is_refused_by_name(self, name, option, message):
        with pytest.raises(ConfigError, match=f"--method.options .*{message}"):
            self.build(name, options=option)

    def test_options_are_taken_as_run_json_gives_them_back_too(self):
        for sparsities in ((0.5, 0.9), [0.5, 0.9]):
            self.build("cram", options={"sparsities": sparsities})
        self.build("granet", options={"initial_distribution": st.Uniform(), "drop_fraction": 0})
        self.build("str", options={"threshold_decay": None})

    @pytest.mark.parametrize(
        ("text", "pattern"),
        [
            ("unstructured", Unstructured()), ("2:4", NM(2, 4)), ("transposable-2:4", NM(2, 4, transposable=True)),
            ("4x4", Block(4, 4)), ("1x8", Block(1, 8)), ("channel", Channel()),
        ],
    )  # fmt: skip
    def test_patterns_have_short_forms(self, text, pattern):
        assert pattern_named(text) == pattern
        assert self.build(pattern=text).pattern == pattern  # type: ignore[attr-defined]

    @pytest.mark.parametrize("text", ["", "2:", ":4", "a:b", "transposable-4x4", "row", "2:4:8", "-2:4"])
    def test_what_is_no_pattern_is_refused(self, text):
        with pytest.raises(ConfigError, match="a pattern is"):
            pattern_named(text)

    def test_all_of_it_is_the_same_after_it_was_written_and_read(self):
        made = dataclasses.replace(
            find_recipe("digits"),
            method=MethodSettings(
                name="rigl", ham=(200.0, 1e-3), per_layer={"re:a=b": 0.5}, options={"decay": "constant"}
            ),
            schedule=ScheduleSettings(kind="periodic", every=0.5, stop=30.0, rounds=5),
            pretrained="runs/a",
        )
        assert recipe_from_plain(json.loads(json.dumps(made.plain()))) == made


class TestDenseHalf:
    @pytest.mark.parametrize(
        ("name", "leaves"),
        [("acdc", True), ("oneshot", True), ("cram", True), ("dense", False), ("static", False), ("rigl", False),
         ("gmp", False), ("granet", False), ("imp", False), ("woodfisher", False), ("str", False)],
    )  # fmt: skip
    def test_what_there_is_to_train_on(self, name, leaves):
        made = find_recipe("digits")
        made = dataclasses.replace(made, method=MethodSettings(name=name))
        assert leaves_dense_half(made) == leaves
        if leaves:
            check_recipe(made)

    def test_lengths_in_steps_wait_for_the_data(self):
        made = find_recipe("digits")
        steps = dataclasses.replace(made.schedule, unit="steps")
        assert leaves_dense_half(dataclasses.replace(made, schedule=steps, method=MethodSettings(name="static")))
