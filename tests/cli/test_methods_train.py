"""``train --method.name``: every method from the command line, with a dense half where there is one."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, Commands

from sparsetwin.checkpoint import Pair
from sparsetwin.grouped_selection import is_nm
from sparsetwin.methods import METHODS

EXTRA = {"woodfisher": ("--method.options", "samples=4")}
NO_DENSE = {
    "static", "snip", "rigl", "set", "topkast", "str", "gmp", "granet", "st3", "woodfisher", "imp", "dense",
}  # fmt: skip
DENSE_START = ("gmp", "granet", "st3", "woodfisher")
KNOWN = {*NO_DENSE, "acdc", "oneshot", "cram"}  # another method may have a dense half or not


QUICK = ("static", "gmp", "oneshot", "imp", "woodfisher", "cram")  # the others are trained in tests/training


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_a_name_is_enough(cli: Commands, name: str) -> None:
    lengths = ("--schedule.warmup", 0.2, "--schedule.sparse", 0.2, "--schedule.dense", 0.2,
               "--schedule.final-dense", 0.2, "--schedule.final-sparse", 0.2)  # fmt: skip
    done = cli.run(
        "train", "digits", *TINY, "--epochs", 1, *lengths, "--method.name", name, *EXTRA.get(name, ()), "--out", "run",
        "--quiet", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    members: Any = done.json["members"]
    said = f"{name} leaves no dense half that could be trained on, so none is" in done.err
    assert said == (name in NO_DENSE) or name not in KNOWN
    assert ("dense-raw" in members) != said
    assert ("sparse" in members) == (name != "dense")
    config = json.loads((cli.folder / "run" / "run.json").read_text())["config"]
    assert config["train"]["dense_finetune"] != said
    assert config["train"]["recalibrate_batches"] == (20 if name == "cram" else 0)
    if name in DENSE_START:
        assert "dense-start" in members
        assert "dense" not in members
        assert "\nSparse " in done.out  # with which the sentence about the run begins


def test_a_dense_half_that_is_asked_for_is_trained_on(cli: Commands) -> None:
    done = cli.run(
        "train", "digits", *TINY, "--epochs", 1, "--method.name", "gmp", "--dense-finetune", "--out", "run", "--quiet",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    members: Any = done.json["members"]
    assert {"dense", "dense-raw", "sparse"} <= set(members)


def test_a_pattern_a_sparsity_for_each_layer_and_options(cli: Commands) -> None:
    def trained(folder: str, *flags: object) -> Path:
        done = cli.run("train", "digits", *TINY, "--epochs", 1, *flags, "--out", folder, "--quiet")
        assert done.code == 0, done.err
        return cli.folder / folder

    run = trained("a", "--method.name", "static", "--method.per-layer", "re:0[.].*=0.5", "4.weight=0.75",
                  "8.weight=0.9", "--schedule.sparsity", 0.840248963)  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["event"] == "phase"][-1]["layers"]
    assert kept == {"0.weight": [36, 72], "4.weight": [144, 576], "8.weight": [128, 1280]}
    run = trained("b", "--method.name", "oneshot", "--method.pattern", "2:4", "--schedule.sparsity", 0.5,
                  "--targets.dense-first")  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    layers = [line for line in lines if line["event"] == "phase" and line["stage"] == "main"][-1]["layers"]
    assert len(layers) == 2
    assert all(2 * kept == size for kept, size in layers.values())


@pytest.mark.parametrize("name", ["gmp", "acdc"])
def test_two_of_four_are_reached_by_way_of_three(cli: Commands, name: str) -> None:
    lengths = {
        "gmp": ("--schedule.start", 0, "--schedule.stop", 0.8, "--schedule.every", 0.05),
        "acdc": (*chain.from_iterable((f"--schedule.{part}", 0.2) for part in
                                      ("warmup", "sparse", "dense", "final-dense", "final-sparse")),
                 "--schedule.ramp", 0.15),
    }[name]  # fmt: skip
    done = cli.run(
        "train", "digits", *TINY, "--epochs", 1, "--method.name", name, "--method.pattern", "2:4",
        "--schedule.sparsity", 0.5, *lengths, "--targets.dense-first", "--out", "run", "--quiet",
    )  # fmt: skip
    assert done.code == 0, done.err
    run = cli.folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    phases = [line for line in lines if line["event"] == "phase" and line["stage"] == "main"]
    shares = [{1 - kept / size for kept, size in line["layers"].values()} for line in phases]
    assert [share for share in shares if share != {0.0}] == {"gmp": [{0.25}, {0.5}], "acdc": [{0.25}, {0.5}] * 2}[name]
    masks = Pair(run / "pair").masks("sparse")
    assert set(masks) == set(phases[-1]["layers"])
    assert all(is_nm(mask, 2, 4) for mask in masks.values())


def test_a_method_that_there_is_not_is_told_with_the_nearest(cli: Commands) -> None:
    done = cli.run("train", "digits", "--method.name", "rigel", "--out", "run")
    assert done.code == 2
    assert "did you mean 'rigl'" in done.error
    assert cli.entries() == []


@pytest.mark.parametrize("name", ["gmp", "rigl", "imp", "cram", "topkast"])
def test_a_schedule_is_shown_before_anything_is_trained(cli: Commands, name: str) -> None:
    done = cli.run("schedule", "digits", "--method.name", name, "--json")
    assert done.code == 0, done.err
    share: Any = done.json["training_flops_over_dense"]
    bounds = {"gmp": (0.3, 0.4), "rigl": (0.1, 0.12), "imp": (0.4, 0.55), "cram": (1.2, 1.4), "topkast": (0.2, 0.25)}
    low, high = bounds[name]
    assert low < share < high


def test_a_student_learns_from_a_run_and_begins_from_one(cli: Commands, trained: Path) -> None:
    flags = ("train", "digits", *TINY, "--epochs", 1, "--method.name", "oneshot", "--schedule.start", 0, "--quiet")
    found: dict[str, Any] = {}
    for name, more in {
        "plain": (),
        "begun": ("--pretrained", trained),
        "taught": ("--pretrained", trained, "--train.teacher", trained),
    }.items():
        done = cli.run(*flags, "--schedule.sparsity", 0.5, *more, "--out", name, "--json")
        assert done.code == 0, done.err
        found[name] = done.json["members"]
    assert found["begun"]["sparse"]["accuracy"] > found["plain"]["sparse"]["accuracy"] + 0.1
    assert found["taught"]["sparse"]["loss"] != found["begun"]["sparse"]["loss"]
    assert found["taught"]["sparse"]["training_share"] > found["begun"]["sparse"]["training_share"]
