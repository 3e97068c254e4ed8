"""What a run folder tells: typed reading, the closing table and one self-contained HTML page."""

from sparsetwin.report._run_folder import (
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
from sparsetwin.report.tables import HEADINGS, MemberRow, cells, markdown, member_rows, verdict

__all__ = [
    "HEADINGS",
    "Epoch",
    "EpochTime",
    "Final",
    "MaskChange",
    "Member",
    "MemberRow",
    "PhaseEnd",
    "Quality",
    "Run",
    "Start",
    "cells",
    "markdown",
    "member_rows",
    "read_run",
    "verdict",
    "write_report",
]
