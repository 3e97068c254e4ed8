"""Methods side by side: one row each, as CSV, Markdown and an HTML page with two plots."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsetwin.report._drawing import MARKERS, SERIES, draw, legend_above
from sparsetwin.report._format import markdown_table, percent, seconds_text, share, sparsity_text
from sparsetwin.report._markup import (
    Markup,
    code,
    facts,
    figure,
    page,
    paragraph,
    section,
    side_by_side,
    table,
    tag,
    text,
)
from sparsetwin.report.html import write_page
from sparsetwin.report.tuning_table import TUNING_HEADINGS, TuningRow, tuning_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How much a method's accuracy exceeds another one's on the same seeds."""

    pairs: int  # seeds on which both came to an end
    difference: float  # of accuracies as fractions, mean
    half_width: float  # of its 95% interval; NaN of one pair
    p_value: float  # two-sided, corrected for the number of comparisons; NaN of one pair


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method at one sparsity, over several seeds. Accuracies are fractions of the test samples."""

    label: str
    sparsity: float | None  # asked for; None of a dense network
    achieved_sparsity: float  # mean over seeds
    epochs: float  # of a run, with the dense training that it began from; mean
    seeds: int  # that came to an end
    accuracy: float  # mean
    deviation: float  # of the sample; NaN of one seed
    half_width: float  # of the 95% interval of the mean; NaN of one seed
    twin_accuracy: float  # of the dense halves, mean; NaN where there are none
    twin_deviation: float  # of the sample; NaN of one seed
    to_reference: Gap | None  # None of the reference itself, and where no seed is paired
    to_dense: Gap | None  # to the dense baseline, if there is one besides the reference
    training_share: float  # training FLOPs over those of the dense training, all passes and pre-training counted
    inference_share: float  # inference FLOPs over the dense network's
    seconds: float  # wall time of a run, mean
    failed: int  # seeds whose training came to nothing
    ranks: bool = True  # False in a smoke test


METHOD_HEADINGS = (
    "method", "sparsity", "achieved", "epochs", "seeds", "test accuracy", "std", "95% interval", "dense twin",
    "to reference", "verdict", "to dense", "verdict on dense", "training FLOPs", "inference FLOPs", "time",
)  # fmt: skip
"""Headings of `method_cells`."""

_ENOUGH_SEEDS = 5
_SIGNIFICANT = 0.05


def verdict_of(row: MethodRow, gap: Gap | None) -> str:
    """Return whether a difference is shown.

    That takes at least five seeds, all of which came to an end for both, and a corrected p-value below 0.05. A smoke
    test shows none.

    Args:
        row: Of the method.
        gap: Its `MethodRow.to_reference` or `MethodRow.to_dense`.
    """
    if gap is None:
        return "–"
    if not row.ranks:
        return "ranks nothing"
    is_whole = gap.pairs == row.seeds + row.failed
    if gap.pairs < _ENOUGH_SEEDS or not is_whole or not gap.p_value < _SIGNIFICANT:
        return "no difference shown"
    return "better" if gap.difference > 0 else "worse"


def method_cells(row: MethodRow) -> tuple[str, ...]:
    """Return a row as text, one for each of `METHOD_HEADINGS`."""

    def points(value: float, sign: str = "") -> str:
        return shown(value, lambda number: f"{100 * number:{sign}.2f}")

    def shown(value: float, text_of: Callable[[float], str]) -> str:
        return "–" if math.isnan(value) else text_of(value)

    def difference(gap: Gap | None) -> str:
        if gap is None:
            return "–"
        return points(gap.difference, "+") + ("" if math.isnan(gap.half_width) else f" ± {points(gap.half_width)}")

    twin = shown(row.twin_accuracy, percent)
    spread = "" if math.isnan(row.twin_deviation) else f" ({points(row.twin_deviation)})"
    interval = "–" if math.isnan(row.half_width) else f"± {points(row.half_width)}"
    seeds = f"{row.seeds} ({row.failed} failed)" if row.failed else str(row.seeds)
    return (
        row.label,
        "dense" if row.sparsity is None else sparsity_text(row.sparsity),
        shown(row.achieved_sparsity, sparsity_text),
        shown(row.epochs, "{:g}".format),
        seeds,
        shown(row.accuracy, percent),
        points(row.deviation),
        interval,
        twin + spread,
        difference(row.to_reference),
        verdict_of(row, row.to_reference),
        difference(row.to_dense),
        verdict_of(row, row.to_dense),
        shown(row.training_share, share),
        shown(row.inference_share, share),
        shown(row.seconds, seconds_text),
    )


def method_markdown(rows: Sequence[MethodRow]) -> str:
    """Return the table in Markdown."""
    return markdown_table(METHOD_HEADINGS, map(method_cells, rows))


def method_csv(rows: Sequence[MethodRow]) -> str:
    """Return the table as CSV, with numbers in full; what there is none of is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    records = [method_record(row) for row in rows]
    writer.writerow(records[0] if records else [])
    for record in records:
        writer.writerow(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in record.values()])
    return buffer.getvalue()


def method_record(row: MethodRow) -> dict[str, str | int | float | bool | None]:
    """Return a row as plain data, what is said of a gap as fields of the row; there are None where it is not."""
    record = {name: value for name, value in vars(row).items() if not name.startswith("to_")}
    for before, gap in (("", row.to_reference), ("dense_", row.to_dense)):
        record[f"{before}pairs"] = gap.pairs if gap else 0
        record[f"{before}difference"] = gap and gap.difference
        record[f"{before}difference_half_width"] = gap and gap.half_width
        record[f"{before}p_value"] = gap and gap.p_value
        record[f"{before}verdict"] = verdict_of(row, gap)
    return record


def write_method_page(
    tables: Mapping[str, Sequence[MethodRow]],
    out: Path,
    *,
    title: str,
    notes: Sequence[str],
    about: Mapping[str, str],
    tuning: Sequence[TuningRow] = (),
) -> Path:
    """Write the HTML page of a comparison.

    Args:
        tables: Heading -> rows.
        out: The page.
        title: Of the page.
        notes: What a reader has to know to judge the numbers.
        about: Facts such as machine, versions and command.
        tuning: Which settings each method got, where they were tuned.
    """
    body = [tag("h1", text(title)), *(paragraph(note) for note in notes)]
    for index, (heading, rows) in enumerate(tables.items()):
        if rows:
            cells = [method_cells(row) for row in rows]
            shown = table(f"{heading}. FLOPs are shares of the dense network's.", METHOD_HEADINGS, cells, texts=1)
            body.append(section(heading, shown, side_by_side(*_plots(rows, key=f"table-{index}"))))
    if tuning:
        cells = [tuning_cells(row) for row in tuning]
        caption = (
            "Chosen by accuracy on the hold-out. FLOPs are those of a row's trials, over those of one dense training."
        )
        shown = table(caption, TUNING_HEADINGS, cells, texts=1)
        body.append(section("Tuning", shown))
    command = about.get("command")
    kept = {name: value for name, value in about.items() if name != "command"}
    body.append(section("How it was made", facts(kept.items()), *([code(command)] if command else [])))
    write_page(out, page(title, body))
    return out


def _plots(rows: Sequence[MethodRow], *, key: str) -> list[Markup]:
    against_flops = draw(
        f"{key}-flops",
        lambda drawn: _paint(drawn, rows, x=lambda row: 100 * row.training_share, label="training FLOPs, % of dense"),
        title="Accuracy against training FLOPs",
        description="One point for each method and sparsity; numbers are in the table.",
    )
    against_sparsity = draw(
        f"{key}-sparsity",
        lambda drawn: _paint(drawn, rows, x=lambda row: 100 * row.achieved_sparsity, label="sparsity, %"),
        title="Accuracy against sparsity",
        description="One point for each method and sparsity; numbers are in the table.",
    )
    captions = ("Accuracy against training FLOPs.", "Accuracy against sparsity. Bars are 95% intervals of the mean.")
    return [figure(drawn, caption) for drawn, caption in zip((against_flops, against_sparsity), captions, strict=True)]


def _paint(drawn: "Figure", rows: Sequence[MethodRow], *, x: Callable[[MethodRow], float], label: str) -> None:
    axes: Axes = drawn.add_subplot()
    for index, name in enumerate(dict.fromkeys(row.label for row in rows)):
        own = [row for row in rows if row.label == name and not math.isnan(row.accuracy)]
        bars = [0.0 if math.isnan(row.half_width) else 100 * row.half_width for row in own]
        axes.errorbar(
            [x(row) for row in own],
            [100 * row.accuracy for row in own],
            yerr=bars,
            label=name,
            color=SERIES[index % len(SERIES)],
            marker=MARKERS[index // len(SERIES) % len(MARKERS)],
            linestyle="none",
            elinewidth=1,
        )
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy, %")
    legend_above(axes, columns=3)
