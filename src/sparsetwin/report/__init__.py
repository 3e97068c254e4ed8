"""What a run folder tells: typed reading, the closing table and one self-contained HTML page."""

from sparsetwin.report._inference import BENCH_FILE
from sparsetwin.report._run_folder import (
    AsInt8,
    Epoch,
    EpochTime,
    Final,
    MaskChange,
    Member,
    PhaseEnd,
    Quality,
    Run,
    Start,
    read_run,
)
from sparsetwin.report.html import write_report
from sparsetwin.report.method_table import (
    METHOD_HEADINGS,
    Gap,
    MethodRow,
    method_cells,
    method_csv,
    method_markdown,
    method_record,
    verdict_of,
    write_method_page,
)
from sparsetwin.report.tables import HEADINGS, MemberRow, cells, lines, markdown, member_rows, verdict
from sparsetwin.report.tuning_table import TUNING_HEADINGS, TuningRow, tuning_cells, tuning_csv, tuning_markdown

__all__ = [
    "BENCH_FILE",
    "HEADINGS",
    "METHOD_HEADINGS",
    "TUNING_HEADINGS",
    "AsInt8",
    "Epoch",
    "EpochTime",
    "Final",
    "Gap",
    "MaskChange",
    "Member",
    "MemberRow",
    "MethodRow",
    "PhaseEnd",
    "Quality",
    "Run",
    "Start",
    "TuningRow",
    "cells",
    "lines",
    "markdown",
    "member_rows",
    "method_cells",
    "method_csv",
    "method_markdown",
    "method_record",
    "read_run",
    "tuning_cells",
    "tuning_csv",
    "tuning_markdown",
    "verdict",
    "verdict_of",
    "write_method_page",
    "write_report",
]
