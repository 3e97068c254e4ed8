"""What ``train`` leaves behind and prints, for people and for programs."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, TINY, Commands, Finished, events, outcome

MEMBERS = ["dense", "dense-best", "dense-raw", "sparse", "sparse-best"]


def test_the_same_command_twice_gives_the_same_bytes(cli: Commands, trained: Path) -> None:
    done = cli.run("train", *SHORT, *TINY, "--out", "again", "--quiet", "--json")
    assert done.code == 0
    assert outcome(cli.folder / "again") == outcome(trained)
    assert (cli.folder / "again" / "report.html").exists()


def test_another_seed_gives_other_weights(cli: Commands, trained: Path) -> None:
    assert cli.run("train", *SHORT, *TINY, "--out", "other", "--seed", "1").code == 0
    assert outcome(cli.folder / "other")["sparse.safetensors"] != outcome(trained)["sparse.safetensors"]


def test_the_final_line_the_pair_and_every_command_tell_the_same_numbers(cli: Commands, trained: Path) -> None:
    final: Any = events(trained)[-1]
    told: Any = cli.run("resume", trained, "--json").json["members"]
    listed = {member["name"]: member for member in json.loads((trained / "pair" / "pair.json").read_text())["members"]}
    assert sorted(told) == sorted(listed) == sorted(final["members"]) == MEMBERS
    for name in MEMBERS:
        found: Any = cli.run("eval", trained, "--half", name, "--json").json
        assert found.keys() == {"half", "split", "accuracy", "loss", "sparsity", "kept", "targets"}
        assert (found["half"], found["split"]) == (name, "test")
        member = final["members"][name]
        assert found["accuracy"] == member["test"]["accuracy"] == told[name]["accuracy"]
        assert found["loss"] == member["test"]["loss"] == listed[name]["metrics"]["test"]["loss"]
        assert found["targets"] == member["targets"] == 72 + 576 + 1280
        assert found["kept"] == member["kept"] == (193 if name.startswith("sparse") else 1928)
        assert found["sparsity"] == pytest.approx(1 - found["kept"] / 1928, abs=1e-12)
        assert 0.3 < found["accuracy"] <= 1
        assert member["file_bytes"] == (trained / "pair" / f"{name}.safetensors").stat().st_size
        held: Any = cli.run("eval", trained, "--half", name, "--split", "holdout", "--json").json
        assert held["accuracy"] == member["holdout"]["accuracy"] == listed[name]["metrics"]["holdout"]["accuracy"]


def test_the_pair_is_two_halves_of_one_course(trained: Path) -> None:
    told: Any = events(trained)
    assert [event["event"] for event in told] == [
        "start", "epoch", "phase", "epoch", "phase", "epoch", "phase", "epoch", "phase", "epoch", "phase", "final"
    ]  # fmt: skip
    phases = [event for event in told if event["event"] == "phase"]
    assert [event["member"] for event in phases] == ["dense-raw", "sparse", "dense-raw", "sparse", "dense"]
    members = told[-1]["members"]
    assert {name: member["step"] for name, member in members.items() if "best" not in name} == {
        "dense": 72, "dense-raw": 54, "sparse": 72
    }  # fmt: skip


def test_run_json_says_what_the_run_was_and_nothing_of_the_place(trained: Path) -> None:
    described = json.loads((trained / "run.json").read_text())
    assert described["command"].startswith("sparsetwin train --epochs 4")
    assert described["recipe"] == "digits"
    assert described["seed"] == described["config"]["seed"] == 0
    assert described["threads"] == 1
    assert described["versions"].keys() == {"python", "sparsetwin", "torch"}
    assert str(trained.parent) not in json.dumps(described)


@pytest.mark.parametrize("holdout", [0, 0.1])
def test_without_a_holdout_there_are_no_best_members(cli: Commands, holdout: float) -> None:
    done = cli.run("train", *SHORT, *TINY, "--dataset.holdout", holdout, "--out", "run", "--json")
    assert done.code == 0
    assert sorted(done.json["members"]) == (MEMBERS if holdout else ["dense", "dense-raw", "sparse"])  # type: ignore[call-overload]
    assert not [event for event in events(cli.folder / "run") if event.get("holdout") and not holdout]


def test_without_fine_tuning_the_dense_half_is_the_end_of_the_last_dense_phase(cli: Commands, trained: Path) -> None:
    assert cli.run("train", *SHORT, *TINY, "--no-dense-finetune", "--out", "run").code == 0
    run = cli.folder / "run"
    assert (run / "pair" / "dense.safetensors").read_bytes() == (
        trained / "pair" / "dense-raw.safetensors"
    ).read_bytes()
    assert not (run / "pair" / "dense-raw.safetensors").exists()
    assert not (run / "checkpoints" / "branch.pt").exists()


def test_a_dense_baseline_of_equal_length_has_one_half(cli: Commands) -> None:
    done = cli.run("train", *SHORT, *TINY, "--method.name", "dense", "--no-dense-finetune", "--out", "run", "--json")
    assert done.code == 0
    members: Any = done.json["members"]
    assert sorted(members) == ["dense", "dense-best"]
    assert members["dense"]["training_share"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("unit", ["steps", "fractions"])
def test_lengths_in_steps_and_fractions_make_the_same_run_as_in_epochs(cli: Commands, trained: Path, unit: str) -> None:
    length = {"steps": "18", "fractions": "0.25"}[unit]
    lengths = [word for name in ("warmup", "sparse", "dense", "final-dense", "final-sparse")
               for word in (f"--schedule.{name}", length)]  # fmt: skip
    assert cli.run("train", "--epochs", "4", *lengths, "--schedule.unit", unit, *TINY, "--out", "run").code == 0
    assert outcome(cli.folder / "run") == outcome(trained)


def test_explicit_phases_make_the_same_run(cli: Commands, trained: Path) -> None:
    phases = ("--schedule.phases", "1", "0", "1", "0.9", "1", "0", "1", "0.9")
    assert cli.run("train", "--epochs", "4", *phases, *TINY, "--out", "run").code == 0
    assert outcome(cli.folder / "run") == outcome(trained)


@pytest.mark.parametrize(("flags", "dense"), [
    (("--targets.dense-first",), {"0.weight"}),
    (("--targets.dense-last",), {"8.weight"}),
    (("--targets.dense-first", "--targets.dense-last"), {"0.weight", "8.weight"}),
    (("--targets.exclude", "4"), {"4.weight"}),
    (("--targets.include", "re:[48].weight"), {"0.weight"}),
])  # fmt: skip
def test_layers_stay_dense_as_flags_say(cli: Commands, flags: tuple[str, ...], dense: set[str]) -> None:
    assert cli.run("train", *SHORT, *TINY, *flags, "--out", "run", "--no-dense-finetune").code == 0
    start: Any = events(cli.folder / "run")[0]
    assert set(start["targets"]) == {"0.weight", "4.weight", "8.weight"} - dense


class TestOwn:
    """A user's own recipes and models."""

    def test_a_recipe_and_its_data_set_train_resume_and_evaluate(self, cli: Commands) -> None:
        done = cli.run("train", "own_recipes:mirrored", "--dataset.note", "mine", "--out", "run", "--json")
        assert done.code == 0, done.err
        described = json.loads((cli.folder / "run" / "run.json").read_text())
        assert described["config"]["dataset"] == {"type": "own_recipes:Mirrored", "holdout": 0.1, "note": "mine"}
        assert cli.run("resume", "run").code == 0
        assert cli.run("eval", "run").code == 0
        assert "--dataset.note" in cli.run("train", "own_recipes:mirrored", "--help").out

    def test_the_default_folder_is_named_after_it(self, cli: Commands) -> None:
        assert cli.run("train", "own_recipes:mirrored").code == 0
        assert (cli.folder / "runs" / "own_recipes-mirrored" / "run.json").exists()

    def test_a_module_in_the_current_folder_is_found(self, cli: Commands) -> None:
        shutil.copy(Path(__file__).with_name("tiny_networks.py"), cli.folder / "lying_here.py")
        done = cli.run("train", *SHORT, "--model.name", "lying_here:Linear", "--out", "run")
        assert done.code == 0, done.err
        assert cli.run("eval", "run").code == 0

    def test_a_model_that_draws_from_every_generator_resumes_to_the_same_bytes(self, cli: Commands) -> None:
        draws = ("--model.name", "tiny_networks:Drawing", "--train.checkpoint-epochs", "0.5")
        assert cli.run("train", *SHORT, *draws, "--out", "whole").code == 0
        running = cli.start("train", *SHORT, *draws, "--out", "run")
        assert running.until(lambda: len(events(cli.folder / "run")) >= 6)
        running.send(signal.SIGKILL)
        running.wait()
        assert cli.run("resume", "run").code == 0
        assert outcome(cli.folder / "run") == outcome(cli.folder / "whole")
        told: Any = cli.run("resume", "whole", "--json").json["members"]
        assert cli.run("eval", "whole", "--json").json["accuracy"] == told["sparse"]["accuracy"]


class TestModelOptions:
    """``--model.options NAME=VALUE``."""

    def parameters(self, cli: Commands, *flags: str) -> int:
        done = cli.run("train", *flags, *SHORT, "--no-dense-finetune", "--out", "run")
        assert done.code == 0, done.err
        start: Any = events(cli.folder / "run")[0]
        shutil.rmtree(cli.folder / "run")
        return int(start["parameters"])

    def test_they_reach_the_network_and_those_of_the_recipe_stay(self, cli: Commands) -> None:
        assert self.parameters(cli, "own_recipes:mirrored") == 64 * 16 + 16 + 160 + 10
        assert self.parameters(cli, "own_recipes:mirrored", "--model.options", "hidden=8") == 64 * 8 + 8 + 80 + 10
        assert self.parameters(cli, "own_recipes:mirrored", "--model.options", "num_classes=12") == 1040 + 12 * 17

    def test_another_model_does_not_get_those_of_the_recipes_own(self, cli: Commands) -> None:
        assert self.parameters(cli, "own_recipes:mirrored", "--model.name", "digits_cnn") == 56_554


def json_of(done: Finished) -> dict[str, object]:
    assert done.code == 0, done.err
    return done.json


@pytest.mark.parametrize("command", [
    ("recipes",), ("methods",), ("doctor",), ("schedule",), ("schedule", "digits"), ("eval", "RUN"), ("resume", "RUN"),
    ("report", "RUN", "--out", "page.html"),
])  # fmt: skip
def test_json_is_one_object_on_the_last_line(cli: Commands, trained: Path, command: tuple[str, ...]) -> None:
    assert json_of(cli.run(*(str(trained) if word == "RUN" else word for word in command), "--json"))


def test_several_runs_are_compared_on_one_page_in_the_current_folder(cli: Commands, trained: Path) -> None:
    shutil.copytree(trained, cli.folder / "a")
    shutil.copytree(trained, cli.folder / "b")
    before = (trained / "report.html").read_bytes()
    done = cli.run("report", "a", "b", "--json")
    assert json_of(done)["report"] == "report.html"
    assert "2 runs compared" in (cli.folder / "report.html").read_text()
    assert (cli.folder / "a" / "report.html").read_bytes() == before


def test_an_unfinished_run_is_reported_as_far_as_it_is(cli: Commands, trained: Path) -> None:
    run = shutil.copytree(trained, cli.folder / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    done = cli.run("report", "run")
    assert done.code == 0
    assert "Still running: epoch 2 of 4, in a sparse phase (90%)" in done.out
