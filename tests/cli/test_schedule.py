"""``schedule``: phases and FLOPs before anything is trained."""

from typing import Any

import pytest
from commands import Commands

from sparsetwin.recipes import RECIPES
from sparsetwin.schedules import PAPER_NAMES, paper

NO_CONV1_FC = ("--targets.dense-first", "--targets.dense-last")


def plan(cli: Commands, *arguments: object) -> Any:
    done = cli.run("schedule", *arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def test_the_default_is_the_papers_imagenet_run(cli: Commands) -> None:
    told = plan(cli)
    expected = paper("imagenet-100", sparsity=0.9, steps_per_epoch=1)
    assert told["phases"] == [[phase.start, phase.stop, phase.sparsity] for phase in expected.phases]
    assert told["training_flops_over_dense"] == pytest.approx(0.55)
    assert told["inference_flops_over_dense"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", PAPER_NAMES)
def test_published_schedules_by_name(cli: Commands, name: str) -> None:
    expected = paper(name, sparsity=0.8, steps_per_epoch=1)
    told = plan(cli, "--epochs", expected.total_steps, "--sparsity", 0.8, "--paper", name, "--warmup", 10,
                "--sparse", 20, "--dense", 20, "--final-dense", 20, "--final-sparse", 30)  # fmt: skip
    assert told["phases"] == [[phase.start, phase.stop, phase.sparsity] for phase in expected.phases]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(cli: Commands, name: str) -> None:
    told = plan(cli, name)
    recipe = RECIPES[name]()
    assert told["epochs"] == recipe.train.epochs
    assert told["phases"][-1][1] == pytest.approx(recipe.train.epochs)
    assert 0.4 < told["training_flops_over_dense"] < 0.8
    assert 0.05 < told["inference_flops_over_dense"] < 0.25
    assert told["target_weights"] == {
        "digits": 56_224, "cifar10-resnet20": 270_896, "cifar100-wrn28-10": 36_518_832,
        "imagenet-resnet50": 25_502_912, "imagenet-mobilenetv1": 4_209_088, "charlm-gpt": 786_432,
    }[name]  # fmt: skip


@pytest.mark.parametrize(("sparsity", "training", "inference"), [
    (0.5, 0.758, 0.517), (0.8, 0.613, 0.227), (0.9, 0.565, 0.130), (0.95, 0.541, 0.082), (0.98, 0.526, 0.053),
])  # fmt: skip
def test_the_papers_uniform_resnet50_costs_what_the_paper_says(
    cli: Commands, sparsity: float, training: float, inference: float
) -> None:
    told = plan(cli, "imagenet-resnet50", *NO_CONV1_FC, "--sparsity", sparsity)
    assert round(told["training_flops_over_dense"], 3) == training
    assert round(told["inference_flops_over_dense"], 3) == inference


def test_depthwise_and_first_layers_of_mobilenet_stay_dense_as_flags_say(cli: Commands) -> None:
    told = plan(cli, "imagenet-mobilenetv1", "--targets.dense-first", "--targets.dense-depthwise")
    assert told["target_weights"] == 4_209_088 - 32 * 3 * 9 - 44_640  # 14 layers are left


def test_the_fine_tuning_of_the_dense_half_is_counted_apart(cli: Commands) -> None:
    told = plan(cli, "imagenet-resnet50", "--dense-finetune")
    assert told["dense_finetune_flops_over_dense"] == pytest.approx(0.15)


def test_a_recipes_schedule_is_overridden_by_short_flags(cli: Commands) -> None:
    told = plan(cli, "digits", "--epochs", 12, "--warmup", 2, "--sparse", 2, "--dense", 2, "--final-dense", 2,
                "--final-sparse", 2, "--sparsity", 0.5)  # fmt: skip
    assert [phase[:2] for phase in told["phases"]] == [[start, start + 2] for start in range(0, 12, 2)]
    assert {phase[2] for phase in told["phases"]} == {0, 0.5}


def test_lengths_that_are_no_whole_epochs_are_shown_as_they_are(cli: Commands) -> None:
    told = plan(cli, "--epochs", 10, "--warmup", 1.5, "--sparse", 1, "--dense", 1, "--final-dense", 1.5,
                "--final-sparse", 2.5)  # fmt: skip
    assert told["phases"][0][:2] == [0, 1.5]


def test_ramps_are_shown_as_they_are(cli: Commands) -> None:
    told = plan(cli, "digits", "--ramp", 2, "--ramp-prunings", 3)
    starts = [phase[0] for phase in told["phases"] if phase[2]]
    assert starts[:6] == [5, 6, 7, 15, 16, 17]
    assert starts[-3:] == [45, 46, 47]
    assert {phase[2] for phase in told["phases"] if phase[0] in (7, 47)} == {0.9}
    published = plan(cli, "--paper", "imagenet-100", "--warmup", 10, "--sparse", 20, "--dense", 20, "--final-dense", 20,
                     "--final-sparse", 30, "--ramp", 2)  # fmt: skip
    assert [phase[0] for phase in published["phases"][1:5]] == [10, 10.667, 11.333, 12]


@pytest.mark.parametrize("flags", [
    ("digits", "--qat-start", "59.75"), ("cifar100-wrn28-10", "--qat-start", "199.75"),
    ("digits", "--qat-start", "0.996", "--unit", "fractions", "--warmup", ".1", "--sparse", ".1", "--dense", ".1",
     "--final-dense", ".1", "--final-sparse", ".2"),
])  # fmt: skip
def test_int8_may_begin_within_an_epoch(cli: Commands, flags: tuple[str, ...]) -> None:
    assert plan(cli, *flags, "--qat")["epochs"] in (60, 200)


def test_a_published_schedule_takes_the_place_of_a_recipes_own_lengths(cli: Commands) -> None:
    told = plan(cli, "cifar10-resnet20", "--paper", "cifar-225", "--epochs", 225)
    assert told["phases"][-1][:2] == [175, 225]


def test_a_dense_baseline_costs_one_dense_run(cli: Commands) -> None:
    told = plan(cli, "cifar10-resnet20", "--method.name", "dense")
    assert told["training_flops_over_dense"] == 1
    assert told["phases"] == [[0, 200, 0]]
