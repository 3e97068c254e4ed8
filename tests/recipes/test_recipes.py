"""Every recipe holds the paper's hyperparameters, and survives being written down."""

import dataclasses
import json

import pytest
import torch

import sparsetwin as st
from sparsetwin.data import CharText, Cifar10, Cifar100, Digits, ImageNet
from sparsetwin.errors import ConfigError, ScheduleError
from sparsetwin.recipes import (
    RECIPES,
    ModelSettings,
    Recipe,
    check_recipe,
    find_recipe,
    recipe_from_plain,
    training_samples,
)
from sparsetwin.schedules import paper
from sparsetwin.training import LearningRateSettings


def learning_rates(recipe: Recipe, *epochs: int) -> list[float]:
    """At the first step of each epoch, with 10 steps an epoch."""
    return [
        recipe.optimizer.lr * recipe.learning_rate.factor(10 * epoch, steps_per_epoch=10, epochs=recipe.train.epochs)
        for epoch in epochs
    ]


class TestPublished:
    """Against acdc-facts.md, 2.1."""

    @pytest.mark.parametrize("name", ["imagenet-resnet50", "imagenet-mobilenetv1"])
    def test_imagenet(self, name: str) -> None:
        recipe = RECIPES[name]()
        assert isinstance(recipe.dataset, ImageNet)
        assert recipe.model == ModelSettings(name=name.split("-")[1])
        optimizer = recipe.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.256, 0.875, False)
        assert optimizer.weight_decay == pytest.approx(3.0517578e-5, rel=1e-7)
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.precision) == (100, 256, "fp16")
        assert recipe.train.label_smoothing == recipe.train.clip_norm == recipe.train.ema_decay == 0
        assert recipe.schedule.build(steps_per_epoch=1, epochs=100) == paper(
            "imagenet-100", sparsity=0.9, steps_per_epoch=1
        )
        assert learning_rates(recipe, 0, 4, 5, 52, 90) == pytest.approx(
            [0.0512, 0.256, 0.256, 0.130117, 0.0069], rel=6e-3
        )
        assert learning_rates(recipe, 85, 99) == pytest.approx([0.0154, 7.0e-5], rel=6e-3)
        assert recipe.learning_rate.every == "epoch"

    def test_cifar100(self) -> None:
        recipe = RECIPES["cifar100-wrn28-10"]()
        assert isinstance(recipe.dataset, Cifar100)
        assert recipe.model == ModelSettings(name="wrn_28_10", options={"dropout": 0.3})
        optimizer = recipe.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.08, 0.9, True)
        assert optimizer.weight_decay == 5e-4
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.precision) == (200, 128, "fp32")
        assert learning_rates(recipe, 0, 75, 76, 115, 116, 155, 156, 199) == pytest.approx(
            [0.08, 0.08, 0.008, 0.008, 8e-4, 8e-4, 8e-5, 8e-5]
        )
        assert recipe.schedule.build(steps_per_epoch=7, epochs=200) == paper(
            "cifar-200", sparsity=0.9, steps_per_epoch=7
        )

    def test_cifar10(self) -> None:
        recipe = RECIPES["cifar10-resnet20"]()
        assert isinstance(recipe.dataset, Cifar10)
        assert recipe.model == ModelSettings(name="resnet20")
        optimizer = recipe.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.1, 0.9, False)
        assert optimizer.weight_decay == 5e-4
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.precision) == (200, 128, "fp32")
        assert learning_rates(recipe, 0, 65, 66, 125, 126, 185, 186) == pytest.approx(
            [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4]
        )
        assert recipe.schedule.build(steps_per_epoch=7, epochs=200) == paper(
            "cifar-200", sparsity=0.9, steps_per_epoch=7
        )

    @pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("digits", "charlm-gpt")])
    def test_all_reset_every_momentum_and_rank_globally(self, name: str) -> None:
        method = RECIPES[name]().method
        built = method.build(RECIPES[name]().schedule, steps_per_epoch=10, epochs=RECIPES[name]().train.epochs)
        assert isinstance(built, st.ACDC)
        assert (built.distribution, built.reset, built.score) == (st.Global(), "all", "magnitude")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_after_it_was_written_and_read(name: str) -> None:
    recipe = find_recipe(name)
    text = json.dumps(recipe.plain())
    assert recipe_from_plain(json.loads(text)) == recipe
    assert recipe_from_plain(json.loads(text)).plain() == recipe.plain()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_trained_as_far_as_is_seen_without_data(name: str) -> None:
    check_recipe(find_recipe(name))


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_can_be_changed_and_comes_back(name: str) -> None:
    recipe = find_recipe(name)
    changed = dataclasses.replace(
        recipe,
        seed=3,
        model=dataclasses.replace(recipe.model, options={"depth": [1, 2], "kind": "x", "rate": 0.5, "off": None}),
        schedule=dataclasses.replace(recipe.schedule, phases=((1.0, 0.0), (2.0, 0.9)), unit="steps"),
        learning_rate=LearningRateSettings(shape="step", milestones=(1.5, 2.0)),
        targets=dataclasses.replace(recipe.targets, exclude=("fc", "re:.*")),
    )
    assert recipe_from_plain(json.loads(json.dumps(changed.plain()))) == changed


def test_what_json_cannot_hold_is_refused_by_name() -> None:
    recipe = dataclasses.replace(find_recipe("digits"), model=ModelSettings(name="gpt", options={"size": object()}))
    with pytest.raises(ConfigError, match=r"recipe.model.options.size is <object"):
        recipe.plain()
    endless = dataclasses.replace(
        find_recipe("digits"), model=ModelSettings(name="gpt", options={"size": float("inf")})
    )
    with pytest.raises(ConfigError, match=r"recipe.model.options.size is inf"):
        endless.plain()


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10-resnet20'"):
        find_recipe("cifar10-resnet")


class TestSchedule:
    """Messages say what to change, in the unit that was given."""

    def settings(self, **changes: object) -> Recipe:
        return dataclasses.replace(
            find_recipe("digits"), schedule=dataclasses.replace(find_recipe("digits").schedule, **changes)
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"warmup": 50}, r"warmup 50 \+ final-dense 5 \+ final-sparse 15 = 70 epochs .* run of 60; train for at"),
            ({"warmup": 50}, r"least 70 epochs \(--epochs 70\)"),
            ({"unit": "fractions", "warmup": 0.5, "sparse": 0.1, "dense": 0.1, "final_dense": 0.3, "final_sparse": 0.3},
             r"= 1.1 of the run, which is more than all of it"),
            ({"dense": -1}, "--schedule.dense: a length is finite and not negative"),
            ({"sparse": 0}, "--schedule.sparse is 0 epochs; give it a length"),
            ({"final_sparse": 0, "warmup": 40, "sparse": 40}, "no sparse phase fits into 60 epochs"),
            ({"sparsity": -0.1}, r"in \[0, 1\), got -0.1"),
            ({"sparsity": float("nan")}, r"in \[0, 1\), got nan"),
            ({"phases": ((30.0, 0.0), (30.0, 1.5))}, r"in \[0, 1\), got 1.5"),
        ],
    )  # fmt: skip
    def test_an_impossible_schedule(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            check_recipe(self.settings(**changes))

    def test_steps_are_counted_when_the_data_are_known(self) -> None:
        settings = self.settings(unit="steps", warmup=90, sparse=90, dense=90, final_dense=90, final_sparse=270)
        assert settings.schedule.build(steps_per_epoch=18, epochs=60) == find_recipe("digits").schedule.build(
            steps_per_epoch=18, epochs=60
        )
        with pytest.raises(
            ScheduleError, match=r"450 steps do not fit into a run of 216; train for at least 25 epochs"
        ):
            settings.schedule.build(steps_per_epoch=18, epochs=12)

    def test_explicit_phases_of_parts_of_epochs_end_where_they_should(self) -> None:
        made = self.settings(phases=((0.33, 0.0), (0.33, 0.9), (1.34, 0.5))).schedule
        assert [phase.stop for phase in made.build(steps_per_epoch=10, epochs=2).phases] == [3, 7, 20]


@pytest.mark.parametrize(
    ("dataset", "samples"),
    [
        (Cifar10(), 45_000),
        (Cifar100(samples=500, holdout=0.0), 500),
        (ImageNet(holdout=0.0), 1_281_167),
        (CharText(), None),
        (CharText(samples=100, context=64), 6400),
    ],
)
def test_samples_of_an_epoch_are_known_before_any_is_read(dataset, samples):
    assert training_samples(dataset) == samples


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.25])
def test_those_of_the_digits_are_what_is_read(holdout):
    digits = Digits(holdout=holdout, drop_last=False)
    read = digits.load(None, batch_size=64, eval_batch_size=64, seed=0, device=torch.device("cpu"))
    assert training_samples(digits) == read.train.samples
