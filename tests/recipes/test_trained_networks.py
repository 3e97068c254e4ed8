"""``--pretrained`` and ``--train.teacher``: where trained networks may come from, and when they are read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_networks import linear
from safetensors.torch import save_file
from torch import nn

from sparsetwin.data import Digits
from sparsetwin.errors import CheckpointError, ConfigError, SparsetwinError, StateError
from sparsetwin.recipes import (
    MethodSettings,
    ModelSettings,
    Recipe,
    ScheduleSettings,
    build_run,
    check_recipe,
    describe,
    recipe_from_plain,
)
from sparsetwin.training import OWN, Run, RunFolder, TrainSettings

LINEAR = ModelSettings(name="recipe_networks:linear")
HALVES = ScheduleSettings(phases=((1.0, 0.0), (1.0, 0.5)))


def recipe(*, method: str = "acdc", model: ModelSettings = LINEAR, schedule: ScheduleSettings = HALVES,
           teacher: str | Path | None = None, pretrained: str | Path | None = None, epochs: int = 2,
           **train: Any) -> Recipe:  # fmt: skip
    return Recipe(
        dataset=Digits(shift=0),
        model=model,
        method=MethodSettings(name=method),
        schedule=schedule,
        train=TrainSettings(epochs=epochs, batch_size=128, teacher=None if teacher is None else str(teacher), **train),
        pretrained=None if pretrained is None else str(pretrained),
        device="cpu",
        threads=1,
    )


def trained(folder: Path, made: Recipe) -> Run:
    run = begun(folder, made)
    assert run.execute()
    return run


def begun(folder: Path, made: Recipe) -> Run:
    check_recipe(made)
    where = RunFolder(folder)
    where.create(describe(made, name="own", data=None, command="", device=torch.device("cpu")))
    return resumed(folder)


def resumed(folder: Path) -> Run:
    where = RunFolder(folder)
    return build_run(recipe_from_plain(where.read()["config"]), where, data=None)


def first_weights(run: Run) -> dict[str, torch.Tensor]:
    """Return what a run begins from, seen as its first batch is asked for."""
    seen: list[dict[str, torch.Tensor]] = []
    train = run.parts.splits.train
    epoch = train.epoch

    def watched(number: int, *, start: int = 0) -> Any:
        seen.append({k: v.clone() for k, v in run._stage.session.model.state_dict().items()})  # type: ignore[union-attr]
        run.request_stop()
        return epoch(number, start=start)

    train.epoch = watched  # type: ignore[method-assign]
    assert not run.execute()
    return seen[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A finished run with a dense and a sparse half."""
    return trained(tmp_path_factory.mktemp("trained") / "run", recipe()).folder.path


@pytest.fixture(scope="module")
def sparse_only(tmp_path_factory) -> Path:
    made = recipe(method="static", schedule=ScheduleSettings(sparsity=0.5), epochs=1)
    return trained(tmp_path_factory.mktemp("static") / "run", made).folder.path


class TestPretrained:
    def test_a_run_folder_gives_its_dense_half(self, pair, tmp_path):
        run = begun(tmp_path / "run", recipe(pretrained=pair))
        dense = Run(RunFolder(pair), run.parts).pair.load("dense", linear()).state_dict()
        found = first_weights(run)
        assert found.keys() == dense.keys()
        assert all(torch.equal(found[name], value) for name, value in dense.items())

    @pytest.mark.parametrize("half", ["dense", "sparse"])
    def test_a_file_of_a_pair_gives_that_half(self, half, pair, tmp_path):
        run = begun(tmp_path / "run", recipe(pretrained=pair / "pair" / f"{half}.safetensors"))
        expected = Run(RunFolder(pair), run.parts).pair.load(half, linear()).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in first_weights(run).items())

    def test_a_file_from_elsewhere_gives_its_tensors(self, tmp_path):
        torch.manual_seed(7)
        model = linear()
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        found = first_weights(begun(tmp_path / "run", recipe(pretrained=tmp_path / "model.safetensors")))
        assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())

    def test_a_run_that_begins_anew_is_not_the_one_from_scratch(self, pair, tmp_path):
        scratch = begun(tmp_path / "scratch", recipe())
        begins = first_weights(begun(tmp_path / "run", recipe(pretrained=pair)))
        assert not torch.equal(begins["1.weight"], first_weights(scratch)["1.weight"])

    def test_resuming_does_not_read_it_again(self, pair, tmp_path):
        whole = trained(tmp_path / "whole", recipe(pretrained=pair / "pair" / "dense.safetensors", dense_finetune=True))
        file = tmp_path / "moved.safetensors"
        file.write_bytes((pair / "pair" / "dense.safetensors").read_bytes())
        run = begun(tmp_path / "run", recipe(pretrained=file, dense_finetune=True))
        first_weights(run)  # which stops it after its first step
        file.unlink()
        again = resumed(tmp_path / "run")
        assert again.execute()
        for name in ("dense-raw", "sparse", "dense"):
            assert again.pair.members[name].sha256 == whole.pair.members[name].sha256

    def test_before_the_first_checkpoint_it_is_needed_and_said_to_be(self, pair, tmp_path):
        file = tmp_path / "moved.safetensors"
        file.write_bytes((pair / "pair" / "dense.safetensors").read_bytes())
        begun(tmp_path / "run", recipe(pretrained=file))
        file.unlink()
        with pytest.raises(ConfigError, match="leave it there: the run needs it until the first checkpoint"):
            resumed(tmp_path / "run").execute()

    def test_run_json_holds_the_whole_path(self, pair, tmp_path, monkeypatch):
        monkeypatch.chdir(pair.parent)
        begun(tmp_path / "run", recipe(pretrained="run", teacher=Path("run") / "pair" / "dense.safetensors"))
        config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
        assert config["pretrained"] == str(pair.resolve())
        assert config["train"]["teacher"] == str((pair / "pair" / "dense.safetensors").resolve())
        monkeypatch.chdir(tmp_path)
        assert resumed(tmp_path / "run").execute()

    @pytest.mark.parametrize("flag", ["pretrained", "teacher"])
    @pytest.mark.parametrize(
        ("what", "error", "message"),
        [
            ("nothing", ConfigError, r"--(pretrained|train.teacher): no trained network at .*/nothing; give a run"),
            ("folder", CheckpointError, "is no run folder: it has no run.json"),
            ("static", ConfigError, r"has no dense half; to use another network, give its file: .*sparse.safetensors"),
            ("begun", ConfigError, "has no dense half yet; train it first"),
        ],
    )  # fmt: skip
    def test_what_is_no_trained_network_is_refused_before_data_are_read(
        self, flag, what, error, message, sparse_only, tmp_path
    ):
        (tmp_path / "folder").mkdir()
        if what == "begun":
            begun(tmp_path / "begun", recipe())
        path = sparse_only if what == "static" else tmp_path / what
        with pytest.raises(error, match=message):
            check_recipe(recipe(**{flag: path}))

    def test_another_network_does_not_fit(self, pair, tmp_path):
        wider = ModelSettings(name=LINEAR.name, options={"hidden": 13})
        with pytest.raises(StateError, match=r"1.weight is \(12, 64\) torch.float32, the model's \(13, 64\)"):
            begun(tmp_path / "a", recipe(pretrained=pair, model=wider)).execute()
        with pytest.raises(StateError, match=r"dense.safetensors does not fit the model: size mismatch for 1.weight"):
            begun(tmp_path / "b", recipe(pretrained=pair / "pair" / "dense.safetensors", model=wider)).execute()
        save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(StateError, match=r"does not fit the model: Missing key\(s\) in state_dict: \"1.weight\""):
            begun(tmp_path / "c", recipe(pretrained=tmp_path / "other.safetensors")).execute()

    def test_a_file_that_is_damaged_or_something_else_is_named(self, pair, tmp_path):
        other = tmp_path / "notes.txt"
        other.write_text("no tensors here")
        with pytest.raises(CheckpointError, match=r"notes.txt is no file of safetensors"):
            begun(tmp_path / "a", recipe(pretrained=other)).execute()
        damaged = bytearray((pair / "pair" / "sparse.safetensors").read_bytes())
        damaged[-3] ^= 1
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged.safetensors"):
            begun(tmp_path / "b", recipe(pretrained=tmp_path / "damaged.safetensors")).execute()


class TestTeacher:
    def test_it_may_be_of_another_architecture(self, tmp_path):
        taught_by = trained(tmp_path / "teacher", recipe(model=ModelSettings(name="recipe_networks:convolution")))
        run = begun(tmp_path / "run", recipe(teacher=taught_by.folder.path))
        make = run.parts.make_teacher
        assert make is not None
        teacher = make()
        assert isinstance(teacher[0], nn.Conv2d)  # type: ignore[index]
        dense = taught_by.pair.load("dense", teacher).state_dict()
        assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())
        assert run.execute()
        plain = trained(tmp_path / "plain", recipe())
        assert run.pair.members["sparse"].sha256 != plain.pair.members["sparse"].sha256

    def test_it_has_to_answer_in_the_same_classes(self, tmp_path):
        teacher = trained(
            tmp_path / "teacher", recipe(model=ModelSettings(name=LINEAR.name, options={"num_classes": 12}))
        )
        run = begun(tmp_path / "run", recipe(teacher=teacher.folder.path))
        with pytest.raises(
            ConfigError, match=r"the teacher's outputs have shape \(128, 12\), the network's \(128, 10\)"
        ):
            run.execute()
        assert run.folder.is_untrained  # so that the command takes the folder away again

    def test_a_stopped_run_needs_it_again_and_ends_with_the_same_bits(self, pair, tmp_path):
        whole = trained(tmp_path / "whole", recipe(teacher=pair))
        run = begun(tmp_path / "run", recipe(teacher=pair))
        first_weights(run)
        again = resumed(tmp_path / "run")
        assert again.execute()
        assert again.pair.members["sparse"].sha256 == whole.pair.members["sparse"].sha256
        described = json.loads((tmp_path / "run" / "run.json").read_text())
        described["config"]["train"]["teacher"] = str(tmp_path / "gone")
        (tmp_path / "run" / "run.json").write_text(json.dumps(described))
        with pytest.raises(ConfigError, match="leave it there: the run needs it to the end"):
            resumed(tmp_path / "run")

    def test_a_sharded_student_is_refused(self, pair, tmp_path):
        made = dataclasses.replace(
            recipe(teacher=OWN), distributed=dataclasses.replace(recipe().distributed, fsdp=True)
        )
        where = RunFolder(tmp_path / "run")
        where.create(describe(made, name="own", data=None, command="", device=torch.device("cpu")))
        with pytest.raises(SparsetwinError, match=r"--train.teacher does not work with --fsdp"):
            build_run(made, where, data=None)
