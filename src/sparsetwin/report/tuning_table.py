"""Which settings each method of a comparison got, from which trials, and what finding them cost."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetwin.report._format import markdown_table, percent, share, sparsity_text


@dataclass(frozen=True, kw_only=True)
class TuningRow:
    """The trials of one method at one sparsity."""

    label: str
    sparsity: float | None  # None of a dense network
    trials: tuple[float, ...]  # accuracies on the hold-out, as fractions; NaN of a trial that failed
    achieved: tuple[float, ...]  # sparsities
    chosen: int  # trial whose settings the compared runs have
    settings: str  # of that trial
    training_share: float  # training FLOPs of all trials over those of one dense training


TUNING_HEADINGS = ("method", "sparsity", "hold-out accuracy of the trials", "chosen", "settings", "FLOPs of the trials")
"""Headings of `tuning_cells`."""


def tuning_cells(row: TuningRow) -> tuple[str, ...]:
    """Return a row as text, one for each of `TUNING_HEADINGS`. Trials are counted from 1."""
    return (
        row.label,
        "dense" if row.sparsity is None else sparsity_text(row.sparsity),
        ", ".join("failed" if math.isnan(accuracy) else percent(accuracy) for accuracy in row.trials),
        str(row.chosen + 1),
        row.settings,
        share(row.training_share),
    )


def tuning_markdown(rows: Sequence[TuningRow]) -> str:
    """Return the table in Markdown."""
    return markdown_table(TUNING_HEADINGS, [tuning_cells(row) for row in rows])


def tuning_csv(rows: Sequence[TuningRow]) -> str:
    """Return a line for each trial as CSV, with numbers in full; those of trials that failed are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["label", "sparsity", "trial", "holdout_accuracy", "achieved_sparsity", "chosen", "settings"])
    for row in rows:
        for trial, (accuracy, achieved) in enumerate(zip(row.trials, row.achieved, strict=True)):
            numbers = ["" if math.isnan(value) else value for value in (accuracy, achieved)]
            is_chosen = trial == row.chosen
            sparsity = "" if row.sparsity is None else row.sparsity
            writer.writerow([row.label, sparsity, trial + 1, *numbers, is_chosen, row.settings if is_chosen else ""])
    return buffer.getvalue()
