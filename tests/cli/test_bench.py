"""``sparsetwin bench inference``: a run and a file, on the engines that every machine has."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import Commands

from sparsetwin.checkpoint import Pair

QUICK = (
    "--engines", "eager", "onnxruntime", "sparsetwin", "--precisions", "fp32", "--rounds", "3",
    "--turn-seconds", "0.0001", "--batch", "4",
)  # fmt: skip
ROWS = {"PyTorch eager", "PyTorch eager, channels last", "ONNX Runtime", "sparsetwin"}
pytest.importorskip("onnxruntime")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The trained run, in a folder that a test may write to."""
    return Path(shutil.copytree(trained, tmp_path / "mine"))


def test_a_run_is_timed_and_its_report_gets_a_section(cli: Commands, run: Path) -> None:
    done = cli.run("bench", "inference", run, *QUICK)
    assert done.code == 0, done.err
    for words in (
        "processor features:",
        "batch 1",
        "batch 4",
        "fp32 only: sparsetwin takes",
        *ROWS - {"PyTorch eager, channels last"},
    ):
        assert words in done.out
    found = json.loads((run / "bench-inference.json").read_text())
    for contest in found["contests"]:
        assert {row["engine"] for row in contest["rows"]} == ROWS
        assert all(row["same_predictions"] == 1 for row in contest["rows"])
    assert found["name"].startswith("mine, sparse half, ")
    page = (run / "report.html").read_text()
    assert "Inference on the machine of the benchmark" in page
    assert all(f'<th scope="row">{name}</th>' in page for name in ROWS)
    assert str(run) not in (run / "bench-inference.json").read_text()


def test_another_half_and_another_file_for_the_result(cli: Commands, run: Path) -> None:
    before = (run / "report.html").read_bytes()
    done = cli.run("bench", "inference", run, "--half", "dense", *QUICK, "--out", "dense.json", "--json")
    assert done.code == 0, done.err
    (found,) = done.json["results"].values()
    assert "dense half" in found["name"]
    assert json.loads((cli.folder / "dense.json").read_text())["name"] == found["name"]
    assert not (run / "bench-inference.json").exists()
    assert (run / "report.html").read_bytes() == before


def test_a_file_is_timed_with_its_network(cli: Commands, trained: Path) -> None:
    file = Pair(trained / "pair").folder / "sparse.safetensors"
    network = ("--model.name", "tiny_networks:convolutional", "--model.options", "num_classes=10", "--input", 1, 8, 8)
    done = cli.run("bench", "inference", file, *QUICK, *network, "--out", "file.json")
    assert done.code == 0, done.err
    found = json.loads((cli.folder / "file.json").read_text())
    assert found["name"].startswith("sparse.safetensors, ")
    assert {row["engine"] for row in found["contests"][0]["rows"]} == ROWS


def test_an_older_format_is_timed_too(cli: Commands, trained: Path) -> None:
    assert cli.run("export", trained, "--to", "sparse-bitmask", "--out", "old.safetensors").code == 0
    network = ("--model.name", "tiny_networks:convolutional", "--model.options", "num_classes=10", "--input", 1, 8, 8)
    done = cli.run("bench", "inference", "old.safetensors", *network, "--engines", "eager", "--rounds", 3, "--batch", 2)
    assert done.code == 0, done.err
    other = ("--model.name", "tiny_networks:Linear", "--input", 1, 8, 8)
    assert "does not fit tiny_networks:Linear" in cli.run("bench", "inference", "old.safetensors", *other).error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--half", "spares"), "spares"),
        ((), "nothing to time"),
        (("nowhere",), "no run folder"),
        (("file",), "holds weights and no network; add --model.name"),
        (("run", "--model.name", "resnet20"), "a run knows its own network"),
        (("run", "run", "--out", "x.json"), "--out takes the result of one source"),
        (("run", "--threads", "0"), "threads should be at least 1"),
        (("run", "--rounds", "1"), "rounds should be at least 3"),
        (("file", "--model.name", "tiny_networks:Linear", "--input", "1", "8", "8"), "sparse.safetensors"),
        (("file", "--model.name", "resnet21", "--input", "1", "8", "8"), "unknown model 'resnet21'"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_message(
    cli: Commands, trained: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"run": trained, "file": trained / "pair" / "sparse.safetensors"}
    done = cli.run("bench", "inference", *(places.get(word, word) for word in arguments))
    assert done.code != 0
    assert message in done.error
    assert not (trained / "bench-inference.json").exists()


def test_a_damaged_result_is_named_by_the_report(cli: Commands, run: Path) -> None:
    (run / "bench-inference.json").write_text('{"version": 1, "name": 3}')
    done = cli.run("report", run)
    assert done.code != 0
    assert "bench-inference.json" in done.error
    (run / "bench-inference.json").write_text('{"version": 2}')
    assert cli.run("report", run).code == 0
    assert "of another version" in (run / "report.html").read_text()


def test_the_page_shows_options_that_there_are(cli: Commands) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
    shown = set(re.findall(r"^sparsetwin bench .*", page, re.MULTILINE))
    flags = {flag for line in shown for flag in re.findall(r"--[a-z.-]+", line)} | {
        "--deepsparse-python",
        "--prepare-seconds",
    }
    told = cli.run("bench", "--help").out
    assert len(shown) == 5
    assert not [flag for flag in flags if f" {flag} " not in told]
