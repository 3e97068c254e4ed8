"""The section of a report about a benchmark of inference."""

import json

import pytest
from run_folders import write_run

from sparsetwin.errors import CheckpointError
from sparsetwin.report import BENCH_FILE, write_report

ROW = {
    "engine": "PyTorch <eager>", "precision": "fp32", "median_ms": 1.25, "min_ms": 1.0, "quartiles_ms": [1.125, 1.5],
    "per_second": 12800.0, "relative_error": 2.5e-7, "same_predictions": 1.0, "note": "runs as: sparse",
    "turn_medians_ms": [1.125, 1.25, 1.5],
}  # fmt: skip
RESULT = {
    "version": 1, "name": "a, sparse half", "inputs": "(batch, 1, 8, 8) float32", "date": "2026-11-23",
    "settings": {"threads": 2}, "machine": {"cpu_features": ["avx2"], "load_average": [0.1, 0.2]},
    "notes": ["This processor has no bf16 instructions."],
    "contests": [{"batch": 16, "rows": [ROW], "missing": {"OpenVINO, fp32": "not installed"},
                  "verdicts": ["fp32 only: 2 times"]}],
}  # fmt: skip


def page(folder, result):
    (folder / BENCH_FILE).write_text(json.dumps(result))
    return write_report([folder], folder / "report.html").read_text()


def test_the_section_holds_every_row_and_every_reason(tmp_path):
    found = page(write_run(tmp_path / "a"), RESULT)
    for words in (
        "Inference on the machine of the benchmark", "PyTorch &lt;eager&gt;", "1.12 to 1.5", "12,800", "2.5e-07",
        "100.0%", "Not measured with 16 sample(s)", "not installed", "fp32 only: 2 times.",
        "no bf16 instructions", "avx2",
    ):  # fmt: skip
        assert words in found


def test_a_run_without_a_benchmark_has_no_section(tmp_path):
    folder = write_run(tmp_path / "a")
    assert "Inference on" not in write_report([folder], folder / "report.html").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        {"contests": 3}, {"contests": [3]}, {"notes": [1]}, {"settings": {}}, {"machine": None}, {"name": 3},
        {"contests": [{"batch": 1, "rows": [{**ROW, "median_ms": "fast"}], "missing": {}, "verdicts": []}]},
        {"contests": [{"batch": 1, "rows": [{**ROW, "quartiles_ms": [1]}], "missing": {}, "verdicts": []}]},
        {"contests": [{"batch": 1, "rows": [], "missing": {"x": 1}, "verdicts": []}]},
    ],
)  # fmt: skip
def test_a_malformed_file_is_named(tmp_path, damage):
    with pytest.raises(CheckpointError, match=BENCH_FILE):
        page(write_run(tmp_path / "a"), {**RESULT, **damage})
