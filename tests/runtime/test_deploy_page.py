"""The page about deploying shows code that runs from top to bottom, and its numbers are those of the results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()
BENCHMARKS = ROOT / "benchmarks" / "results"
RESULTS = sorted((BENCHMARKS / "inference").glob("*.json"))
PROFILE = json.loads((BENCHMARKS / "inference-profile" / "resnet50.json").read_text())


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
    found = json.loads((BENCHMARKS / "memory" / "resnet50.json").read_text())
    lines = [memory_row(row) for row in found["rows"]]
    assert len(lines) > 10
    assert "\n".join(lines) in PAGE
    assert found["versions"]["torch"].split("+")[0] in PAGE


def tokens_table() -> str:
    """One token's rows of a file of results, as the page shows them."""
    found = json.loads((BENCHMARKS / "kernels" / "tokens.json").read_text())["results"]["1 threads"]
    names = ["torch dense", "torch dense bf16", "torch CSR", "sparse fp32", "sparse bf16"]
    lines = [f"| sparsity | {', ms | '.join(names)}, ms | sparse fp32 x torch bf16 | sparse bf16 x torch bf16 |"]
    lines.append("| --- " * 8 + "|")
    for case, rows in found.items():
        if ", 1 tokens, " in case:
            cells = [f"{rows[name]['median_ms']:.3f}" for name in names]
            cells += [f"{rows[name]['times_faster_than']['torch dense bf16']:.1f}" for name in names[-2:]]
            lines.append(f"| {1 - float(case.rsplit(' ', 1)[-1]):.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_one_token_is_that_of_the_results():
    assert tokens_table().count("\n") == 5
    assert tokens_table() in PAGE


def trained_table() -> str:
    """A trained network on every engine, as the page shows it."""
    contests = {
        (sparsity, contest["batch"]): {row["engine"]: row for row in contest["rows"]}
        for sparsity in ("90", "95")
        for contest in json.loads((BENCHMARKS / "inference-trained" / f"resnet20-{sparsity}.json").read_text())[
            "contests"
        ]
    }
    names = list(dict.fromkeys(name for rows in contests.values() for name in rows))
    lines = [f"| engine | {' | '.join(f'{sparsity}%, batch {batch}' for sparsity, batch in contests)} |"]
    lines.append("| --- " + "| ---: " * len(contests) + "|")
    for name in names:
        cells = [
            f"{rows[name]['median_ms']:.2f} ms, {rows[name]['median_ms'] / rows['sparsetwin']['median_ms']:.2f}x"
            for rows in contests.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_a_trained_network_is_that_of_the_results():
    assert trained_table().count("\n") > 5
    assert trained_table() in PAGE


def profile_table() -> str:
    """Where the time goes, as the page shows it."""
    names = "in order | alone | from the cache | billion operations a second, in order"
    lines = [f"| sparsity | kernels | {names} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for sparsity, rows in PROFILE["results"].items():
        for kind, row in rows.items():
            own = [f"{row[key]:.1f}" for key in ("in_order_ms", "alone_ms", "band_ms")]
            speed = f"{row['gigaflops_in_order']:.0f}"
            cells = [*own, speed] if row["gigaflops_in_order"] else [*own[:2], "", ""]
            lines.append(f"| {sparsity} | {kind} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def limits_table() -> str:
    """The inner loop by itself beside the whole network, as the page shows it."""
    (first, *_) = PROFILE["limits"].values()
    lines = [f"| sparsity | {' | '.join(first)} | network |", "| --- | " + "---: | " * (len(first) + 1)]
    for sparsity, found in PROFILE["limits"].items():
        cells = [*found.values(), PROFILE["results"][sparsity]["all"]["gigaflops_in_order"]]
        lines.append(f"| {sparsity} | {' | '.join(f'{speed:.0f}' for speed in cells)} |")
    return "\n".join(line.rstrip() for line in lines)


def test_the_profile_of_the_page_is_that_of_the_results():
    assert len(PROFILE["results"]) == len(PROFILE["limits"]) > 1
    assert profile_table() in PAGE
    assert limits_table() in PAGE
    saved = [
        f"{100 * (1 - rows['all']['band_ms'] / rows['all']['in_order_ms']):.0f}% at {sparsity}"
        for sparsity, rows in PROFILE["results"].items()
    ]
    assert f"could save {' and '.join(saved)}" in PAGE


def memory_row(row: dict[str, Any]) -> str:
    """One process's line of the table, as the page shows it."""
    how = f"{row['how']}, prefer memory" if row.get("prefer") == "memory" else row["how"]
    sparsity = f"{row['sparsity']:.0%}" if "sparsity" in row else ""
    sizes = " | ".join(f"{row[key] / 1e6:.1f}" for key in ("file_bytes", "loading", "held", "running"))
    return f"| {row['file']} | {sparsity} | {how} | {sizes} | {row['call_ms']:.1f} |"
