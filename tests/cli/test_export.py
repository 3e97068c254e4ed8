"""A user's story: train the digits, export the sparse half to every format, run each in its real engine."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Commands, Server
from engines import ENGINES, Predict, from_weights, logits_of
from safetensors.torch import load_file
from torch import nn

from sparsetwin.checkpoint import Pair, load_sparse, read_card
from sparsetwin.data import Digits
from sparsetwin.models import MODELS

pytest.importorskip("onnxruntime")
NOTICE = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, DOI 10.24432/C50P49, CC BY 4.0"


def make() -> nn.Module:
    return MODELS["digits_cnn"](num_classes=10)


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, trained for 25 epochs; tests only read it."""
    folder = tmp_path_factory.mktemp("digits")
    done = Commands(server, folder).run(
        "train", "digits", "--epochs", "25", "--no-dense-finetune", "--quiet", "--threads", "1", "--out", "run"
    )
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="module")
def tested(run: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Images and labels of the test set, and the logits of the sparse half in PyTorch."""
    splits = Digits().load(None, batch_size=64, eval_batch_size=453, seed=0, device=torch.device("cpu"))
    ((images, labels),) = list(splits.test.epoch(0))
    return images, labels.numpy(), logits_of(Pair(run / "pair").sparse(make()))(images)


@pytest.mark.parametrize(("to", "name", "load"), ENGINES)
def test_every_engine_predicts_what_pytorch_does(
    cli: Commands, run: Path, tested: tuple[torch.Tensor, np.ndarray, np.ndarray], to: str, name: str,
    load: Callable[[Path, Callable[[], nn.Module]], Predict],
) -> None:  # fmt: skip
    done = cli.run("export", run, "--to", to, "--out", name, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    images, labels, logits = tested
    assert (logits.argmax(1) == labels).mean() > 0.95
    found = load(cli.folder / name, make)(images)
    np.testing.assert_array_equal(found.argmax(1), logits.argmax(1))
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()
    told = done.json
    files = [path for path in cli.folder.iterdir() if path.is_file()]
    assert told["bytes"] == sum(path.stat().st_size for path in files)
    assert len(files) == (2 if to == "openvino" else 1)
    assert bool(told["checked"]) == (to in ("onnx", "torch-export", "openvino"))


@pytest.mark.parametrize(
    ("values", "images_lost", "part"), [("bfloat16", 1, 0.13), ("float16", 1, 0.13), ("int8", 4, 0.1)]
)
def test_fewer_bits_cost_little_accuracy_and_save_room(
    cli: Commands, run: Path, tested: tuple[torch.Tensor, np.ndarray, np.ndarray], values: str, images_lost: int,
    part: float,
) -> None:  # fmt: skip
    done = cli.run("export", run, "--to", "safetensors", "--values", values, "--out", "m", "--json")
    assert done.code == 0, done.err
    images, labels, logits = tested
    found = from_weights(cli.folder / "m", make)(images)
    right = [int((predicted.argmax(1) == labels).sum()) for predicted in (logits, found)]
    assert abs(right[0] - right[1]) <= images_lost  # of 453
    assert not np.array_equal(found, logits)
    told = done.json
    assert float(str(told["bytes"])) < part * float(str(told["dense_bytes"]))


def test_the_file_carries_where_the_data_are_from(cli: Commands, run: Path) -> None:
    assert cli.run("export", run, "--to", "torch-export", "--out", "m.pt2").code == 0
    files = {"sparsetwin.json": ""}
    torch.export.load(cli.folder / "m.pt2", extra_files=files)
    notes = json.loads(files["sparsetwin.json"])
    assert notes["data_notice"] == NOTICE
    assert notes["half"] == "sparse"


def test_the_card_of_a_file_has_the_numbers_of_the_half(cli: Commands, run: Path) -> None:
    assert cli.run("export", run, "--to", "safetensors", "--out", "m").code == 0
    original, card = (read_card(path) for path in (run / "pair" / "sparse.safetensors", cli.folder / "m"))
    assert isinstance(original["sparsity"], float)
    assert card == {**original, "half": "sparse"}


def test_the_dense_half_is_exported_too(cli: Commands, run: Path) -> None:
    pair = Pair(run / "pair")
    half = next(name for name, member in pair.members.items() if member.kept == member.targets)
    assert cli.run("export", run, "--half", half, "--to", "safetensors", "--out", "dense").code == 0
    expected = pair.network(half).tensors
    found = load_file(cli.folder / "dense")  # any tool reads it
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    refused = cli.run("export", run, "--half", half, "--to", "2:4", "--out", "m")
    assert refused.code == 1
    assert "has no pruned weights; 2:4 is for a sparse one" in refused.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "safetensors", "--values", "int8"), "leave --values out, which writes a plain file of safetensors"),
        (("--to", "sparse-bitmask"), "sparse-bitmask is for a sparse one; take safetensors"),
    ],
)
def test_forms_of_sparse_weights_are_refused_for_a_half_without_any(
    cli: Commands, run: Path, arguments: tuple[str, ...], message: str
) -> None:
    pair = Pair(run / "pair")
    half = next(name for name, member in pair.members.items() if member.kept == member.targets)
    assert cli.run("export", run, "--half", half, "--to", "safetensors", "--out", "dense").code == 0
    for source in ((run, "--half", half), (cli.folder / "dense",)):
        done = cli.run("export", *source, *arguments, "--out", "m")
        assert done.code == 1
        assert "has no pruned weights" in done.error
        assert message in done.error
        assert cli.entries() == ["dense"]


def test_files_are_converted_both_ways_without_the_run(cli: Commands, run: Path) -> None:
    original = run / "pair" / "sparse.safetensors"
    assert cli.run("export", original, "--to", "sparse-bitmask", "--out", "legacy").code == 0
    assert cli.run("export", "legacy", "--to", "safetensors", "--out", "back").code == 0
    expected, found = load_sparse(original), load_sparse(cli.folder / "back")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())
    assert cli.run("export", original, "--to", "safetensors", "--values", "int8", "--out", "small").code == 0
    assert read_card(cli.folder / "small") == read_card(original)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--to", "2:4", "--out", "m"), 1, r"conv1.weight is not 2:4: its shape (32, 1, 3, 3) has no inputs in groups"),
        (("--half", "spares", "--to", "onnx", "--out", "m"), 1, "no half 'spares'"),
        (("--to", "onnx", "--values", "int8", "--out", "m"), 2, "--values int8 is for safetensors and 2:4; onnx"),
        (("--to", "safetensors", "--opset", "20", "--out", "m"), 2, "--opset is for onnx, not for safetensors"),
        (("--to", "onnx", "--opset", "12", "--out", "m"), 1, "opset 18 and later, onnx here up to"),
        (("--to", "openvino", "--out", "m.bin"), 2, "a file of openvino ends in .xml, got --out m.bin"),
        (("--to", "torch-export", "--out", "m"), 2, "a file of torch-export ends in .pt2"),
        (("--to", "onnx", "--out", "."), 2, "--out . is a folder; name the file to write"),
        (("--to", "onnx"), 2, "--out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_and_nothing_written(
    cli: Commands, run: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = cli.run("export", run, *arguments)
    assert done.code == code
    assert message in done.error
    assert cli.entries() == []


def test_the_pairs_own_folder_is_not_written_to(cli: Commands, run: Path) -> None:
    before = {path.name: path.read_bytes() for path in (run / "pair").iterdir()}
    done = cli.run(
        "export", run, "--to", "safetensors", "--values", "int8", "--out", run / "pair" / "sparse.safetensors"
    )
    assert "is in the pair's own folder" in done.error
    assert {path.name: path.read_bytes() for path in (run / "pair").iterdir()} == before


def test_a_file_of_weights_is_no_network(cli: Commands, run: Path) -> None:
    done = cli.run("export", run / "pair" / "sparse.safetensors", "--to", "onnx", "--out", "m.onnx")
    assert (
        "holds weights and no network; onnx needs a run, a file goes to safetensors, sparse-bitmask, 2:4" in done.error
    )
    (cli.folder / "noise").write_bytes(b"no safetensors file")
    assert "noise is truncated, corrupted" in cli.run("export", "noise", "--to", "safetensors", "--out", "m").error
    assert "is no run folder" in cli.run("export", "absent", "--to", "onnx", "--out", "m.onnx").error
