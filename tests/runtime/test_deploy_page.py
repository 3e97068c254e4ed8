"""The page about deploying shows code that runs from top to bottom, and its numbers are those of the results."""

import json
import re
from pathlib import Path
from typing import Any

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
    """The table of a file of results, or its part of one, as the page shows it."""
    found = json.loads(path.read_text())
    results, settings = found["results"], found["settings"]
    if path.stem.startswith("scaling"):
        return "\n".join(scaling_row(name, row, settings) for name, row in results.items())
    if path.stem.startswith("deepsparse"):
        shares = [name.removeprefix("sparsetwin ") for name in results if name.startswith("sparsetwin")]
        return "\n".join(deepsparse_row(share, results, settings) for share in shares)
    dense = [name for name in results if "%" not in name]
    lines = [f"| | ms | {' | '.join(f'x {name}' for name in dense)} |", "| --- " * (2 + len(dense)) + "|"]
    for name, found in results.items():
        cells = [f"{found['times_faster_than'][other]:.2f}" for other in dense]
        lines.append(f"| {name} | {found['median_ms']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def deepsparse_row(share: str, results: dict[str, Any], settings: dict[str, Any]) -> str:
    (other,) = [row for name, row in results.items() if name.startswith("DeepSparse") and name.endswith(f" {share}")]
    ours, masks = results[f"sparsetwin {share}"]["median_ms"], "as AC/DC" if settings["masks"] == "acdc" else "uniform"
    (against,) = [times for name, times in other["times_faster_than"].items() if name.startswith("onnxruntime")]
    (faster,) = [
        times for name, times in results[f"sparsetwin {share}"]["times_faster_than"].items() if "DeepSparse" in name
    ]
    times = f"{ours:.1f} | {other['median_ms']:.1f} | {faster:.2f} | {against:.2f}"
    return f"| {settings['batch']} | {masks} | {share} | {times} |"


def scaling_row(name: str, row: dict[str, Any], settings: dict[str, Any]) -> str:
    (median, low, high), (processes, *_) = row["threads_times_faster"], row["processes_times_as_much"]
    times = f"{row['one_thread_ms']:.1f} | {row['threads_ms']:.1f}"
    share = name.removeprefix("sparsetwin ")
    return f"| {settings['batch']} | {share} | {times} | {median:.2f} ({low:.2f} to {high:.2f}) | {processes:.2f} |"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_tables_of_the_page_are_those_of_the_results(path):
    assert table(path) in PAGE
    assert path.name in PAGE


def test_there_are_results():
    assert RESULTS


def test_the_table_of_memory_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "memory" / "resnet50.json").read_text())
    lines = [memory_row(row) for row in found["rows"]]
    assert len(lines) > 10
    assert "\n".join(lines) in PAGE
    assert found["versions"]["torch"].split("+")[0] in PAGE


def test_the_profile_of_the_page_is_that_of_the_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "inference-profile" / "resnet50.json").read_text())
    assert len(found["results"]) > 1
    for sparsity, rows in found["results"].items():
        for kind, row in rows.items():
            assert f"| {sparsity} | {kind} | {row['in_order_ms']:.1f} | {row['alone_ms']:.1f} |" in PAGE
    assert all(f"{speed:.0f} " in PAGE for speed in found["limits"].values())


def memory_row(row: dict[str, Any]) -> str:
    """One process's line of the table, as the page shows it."""
    how = f"{row['how']}, prefer memory" if row.get("prefer") == "memory" else row["how"]
    sparsity = f"{row['sparsity']:.0%}" if "sparsity" in row else ""
    sizes = " | ".join(f"{row[key] / 1e6:.1f}" for key in ("file_bytes", "loading", "held", "running"))
    return f"| {row['file']} | {sparsity} | {how} | {sizes} | {row['call_ms']:.1f} |"
