"""Each trainer's page shows its example from top to bottom, and the example runs, stops and goes on."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsetwin as st

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "transformers": "transformers_gpt2.py",
    "accelerate": "accelerate_digits.py",
    "lightning": "lightning_digits.py",
    "timm": "timm_digits.py",
}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_code_of_a_page_is_its_example(page: str):
    text = (ROOT / "docs" / "guides" / f"{page}.md").read_text()
    shown = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert lines(shown) == lines((ROOT / "examples" / EXAMPLES[page]).read_text())


def test_every_trainer_has_a_page():
    assert {path.stem for path in (ROOT / "docs" / "guides").glob("*.md")} >= EXAMPLES.keys()


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    """Run an example as a script, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def check_pair(folder: Path, output: str) -> None:
    members = st.Pair(folder).members
    assert members.keys() == {"dense", "sparse"}
    sparse = members["sparse"]
    assert sparse.sparsity == pytest.approx(0.8, abs=1e-3)
    assert f"sparse: {sparse.kept:,} of {sparse.targets:,} weights kept" in output


def hashes(folder: Path) -> dict[str, str]:
    return {name: member.sha256 for name, member in st.Pair(folder).members.items()}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_the_transformers_example_runs_and_goes_on(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers", reason="this example needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    short = tmp_path / "short.txt"
    short.write_bytes(text_file.read_bytes()[:100_000])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    given = ("--text", short, "--out", tmp_path, "--steps", 20, "--width", 16)
    run("transformers_gpt2.py", monkeypatch, *given)
    check_pair(tmp_path / "pair", capsys.readouterr().out)
    before = hashes(tmp_path / "pair")
    (tmp_path / "checkpoint-20").rename(tmp_path / "gone")
    run("transformers_gpt2.py", monkeypatch, *given, "--resume")
    assert hashes(tmp_path / "pair") == before


def test_the_accelerate_example_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("accelerate", reason="this example needs accelerate")
    run("accelerate_digits.py", monkeypatch, "--out", tmp_path, "--epochs", 10)
    check_pair(tmp_path / "pair", capsys.readouterr().out)
    before = hashes(tmp_path / "pair")
    assert st.Pair(tmp_path / "pair").members["sparse"].metrics["test_accuracy"] > 0.8
    run("accelerate_digits.py", monkeypatch, "--out", tmp_path, "--epochs", 10, "--resume", 6)
    assert hashes(tmp_path / "pair") == before


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")
def test_the_lightning_example_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("lightning", reason="this example needs lightning")
    run("lightning_digits.py", monkeypatch, "--out", tmp_path, "--epochs", 12)
    check_pair(tmp_path / "pair", capsys.readouterr().out)
    assert st.Pair(tmp_path / "pair").members["sparse"].metrics["sparse_accuracy"] > 0.7
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["callbacks"]["sparsetwin.Sparsifier"]["masks"]
    run("lightning_digits.py", monkeypatch, "--out", tmp_path, "--epochs", 12, "--resume", tmp_path / "best.ckpt")


def test_the_timm_example_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import_timm()
    given = ("--out", tmp_path, "--epochs", 7, "--model", "test_resnet")
    run("timm_digits.py", monkeypatch, *given)
    check_pair(tmp_path / "pair", capsys.readouterr().out)
    before = hashes(tmp_path / "pair")
    run("timm_digits.py", monkeypatch, *given, "--resume", tmp_path / "checkpoint-3.pth.tar")
    assert hashes(tmp_path / "pair") == before


def import_timm() -> Any:
    """Return timm, or skip: it needs torchvision, which imports only beside the torch that it was built for."""
    try:
        return pytest.importorskip("timm", reason="the adapter of timm needs it")
    except RuntimeError as error:
        pytest.skip(f"timm is installed but cannot be imported: {error}")
