"""``--qat``: a sparse half that an int8 file does not change, from training to export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, TINY, Commands, events, outcome

from sparsetwin.checkpoint import Pair, load_sparse

FIRST = 3 * 18


@pytest.fixture(scope="module")
def quantized(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qat")
    done = Commands(server, folder).run("train", *SHORT, *TINY, "--qat", "--out", "run", "--quiet")
    assert done.code == 0, done.err
    assert "sparse, int8 values" in done.out
    assert "With int8 values the file is" in done.out
    return folder / "run"


def test_the_exported_int8_file_holds_the_sparse_half_to_the_bit(cli: Commands, quantized: Path) -> None:
    done = cli.run("export", quantized, "--to", "safetensors", "--values", "int8", "--out", "int8.safetensors")
    assert done.code == 0, done.err
    found, expected = load_sparse(cli.folder / "int8.safetensors"), Pair(quantized / "pair").network("sparse")
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_the_run_says_so_everywhere(cli: Commands, quantized: Path) -> None:
    told: Any = events(quantized)
    assert told[0]["int8_step"] == FIRST
    sparse = told[-1]["members"]["sparse"]
    assert sparse["int8"]["test"] == sparse["test"]
    assert json.loads((quantized / "run.json").read_text())["config"]["method"]["qat"] is True
    page = (quantized / "report.html").read_text()
    assert "sparse, int8 values" in page
    assert "from step 54 on" in page
    assert "int8 test accuracy" in (quantized / "pair" / "README.md").read_text()
    rows: Any = cli.run("resume", quantized, "--json").json["members"]
    assert rows["sparse"]["int8_accuracy"] == rows["sparse"]["accuracy"]
    assert rows["sparse"]["int8_file_bytes"] == sparse["int8"]["file_bytes"] < sparse["file_bytes"]
    assert rows["dense"]["int8_accuracy"] is None


def test_the_dense_half_is_that_of_a_run_without_it(quantized: Path, trained: Path) -> None:
    ours, theirs = outcome(quantized), outcome(trained)
    for name in ("dense", "dense-raw", "dense-best"):
        assert ours[f"{name}.safetensors"] == theirs[f"{name}.safetensors"]
    assert ours["sparse.safetensors"] != theirs["sparse.safetensors"]


def test_its_begin_is_given_in_epochs(cli: Commands, quantized: Path) -> None:
    done = cli.run("train", *SHORT, *TINY, "--qat", "--qat-start", 3, "--out", "run", "--quiet")
    assert done.code == 0, done.err
    assert outcome(cli.folder / "run") == outcome(quantized)


@pytest.mark.parametrize(("flags", "message"), [
    (("--qat-start", 3), "add --qat"),
    (("--qat", "--qat-start", 2), "let it begin from step"),
    (("--qat", "--method.name", "dense", "--no-dense-finetune"), "ends dense"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_nothing(cli: Commands, flags: tuple[object, ...], message: str) -> None:
    done = cli.run("train", *SHORT, *TINY, *flags, "--out", "run")
    assert done.code == 2
    assert message in done.error
    assert cli.entries() == []
