"""The page about deploying shows code that runs from top to bottom, and its numbers are those of the results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()
RESULTS = sorted((ROOT / "benchmarks" / "results" / "inference").glob("*.json"))


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
    exec(compile(code, "deploy.md", "exec"), {})
    assert (tmp_path / "resnet20.deployed.safetensors").exists()


def table(path: Path) -> str:
    """The table of a file of results, as the page shows it."""
    results = json.loads(path.read_text())["results"]
    dense = [name for name in results if "%" not in name]
    lines = [f"| | ms | {' | '.join(f'x {name}' for name in dense)} |", "| --- " * (2 + len(dense)) + "|"]
    for name, found in results.items():
        cells = [f"{found['times_faster_than'][other]:.2f}" for other in dense]
        lines.append(f"| {name} | {found['median_ms']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_of_the_page_are_those_of_the_results(path):
    assert table(path) in PAGE
    assert path.name in PAGE


def test_there_are_results():
    assert RESULTS
