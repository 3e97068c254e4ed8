"""The table of a comparison: what a row says, and what it does not."""

import csv
import io
import math
from dataclasses import replace

import pytest

from sparsetwin.report import (
    METHOD_HEADINGS,
    Gap,
    MethodRow,
    method_cells,
    method_csv,
    method_markdown,
    verdict_of,
    write_method_page,
)

GAP = Gap(pairs=5, difference=-0.0123, half_width=0.0051, p_value=0.01)
ROW = MethodRow(
    label="gmp", sparsity=0.9, achieved_sparsity=0.9, epochs=60.0, seeds=5, accuracy=0.7512, deviation=0.0034,
    half_width=0.0042, twin_accuracy=0.7634, twin_deviation=0.0021, to_reference=GAP,
    to_dense=replace(GAP, difference=-0.02, p_value=0.3), training_share=0.56, inference_share=0.12, seconds=61.0,
    failed=0,
)  # fmt: skip
NAN = math.nan
NOTHING = replace(
    ROW, label="wild", achieved_sparsity=NAN, epochs=NAN, seeds=0, accuracy=NAN, deviation=NAN, half_width=NAN,
    twin_accuracy=NAN, twin_deviation=NAN, to_reference=None, to_dense=None,
    training_share=NAN, inference_share=NAN, seconds=NAN, failed=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("of_row", "of_gap", "verdict"),
    [
        ({}, {}, "worse"),
        ({}, {"difference": 0.01}, "better"),
        ({}, {"p_value": 0.05}, "no difference shown"),
        ({"seeds": 4}, {"pairs": 4}, "no difference shown"),
        ({}, {"pairs": 4}, "no difference shown"),  # five of its own seeds, but the other failed in one
        ({"seeds": 6}, {}, "no difference shown"),  # six of its own, and the other failed in one
        ({"failed": 1}, {}, "no difference shown"),  # five that came to an end, of six
        ({}, {"p_value": NAN}, "no difference shown"),
        ({"ranks": False}, {}, "ranks nothing"),
    ],
)
def test_a_verdict_takes_five_pairs_without_a_failed_seed_and_a_small_p_value(of_row, of_gap, verdict):
    assert verdict_of(replace(ROW, **of_row), replace(GAP, **of_gap)) == verdict
    assert verdict_of(replace(ROW, **of_row), None) == "–"


def test_cells_are_what_a_reader_needs():
    assert dict(zip(METHOD_HEADINGS, method_cells(ROW), strict=True)) == {
        "method": "gmp", "sparsity": "90%", "achieved": "90%", "epochs": "60", "seeds": "5", "test accuracy": "75.12%",
        "std": "0.34", "95% interval": "± 0.42", "dense twin": "76.34% (0.21)", "to reference": "-1.23 ± 0.51",
        "verdict": "worse", "to dense": "-2.00 ± 0.51", "verdict on dense": "no difference shown",
        "training FLOPs": "56%", "inference FLOPs": "12%", "time": "1 min 1 s",
    }  # fmt: skip


def test_a_method_that_failed_on_every_seed_has_dashes_and_says_so():
    cells = method_cells(NOTHING)
    assert cells[4] == "0 (3 failed)"
    assert set(cells[2:4] + cells[5:]) == {"–"}
    assert method_cells(replace(ROW, seeds=4, failed=1))[4] == "4 (1 failed)"
    assert "76.34%" in method_cells(replace(ROW, seeds=1, twin_deviation=NAN))


def test_csv_has_numbers_in_full_and_nothing_where_there_is_none():
    row, nothing = csv.DictReader(io.StringIO(method_csv([replace(ROW, accuracy=1 / 3), NOTHING])))
    assert float(row["accuracy"]) == 1 / 3
    assert (row["verdict"], nothing["accuracy"], nothing["failed"]) == ("worse", "", "3")
    assert (row["dense_difference"], row["dense_p_value"], nothing["dense_pairs"]) == ("-0.02", "0.3", "0")


def test_a_page_of_one_row_of_nothing_can_be_drawn(tmp_path):
    page = write_method_page(
        {"Equal epochs": [ROW, NOTHING], "Equal training FLOPs": []}, tmp_path / "page.html", title="a <b>",
        notes=["said"], about={"command": "sparsetwin compare", "machine": "m"},
    )  # fmt: skip
    text = page.read_text()
    assert "a &lt;b&gt;" in text
    assert "0 (3 failed)" in text
    assert "Equal training FLOPs" not in text


def test_markdown_escapes_what_would_end_a_cell():
    assert method_markdown([replace(ROW, label="a|b")]).splitlines()[-1].startswith("| a&#124;b | 90% |")
