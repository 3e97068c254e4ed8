"""``sparsetwin report RUN [RUN ...]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sparsetwin.cli._call import parse, print_json
from sparsetwin.report import member_rows, read_run, verdict, write_report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw loss, accuracy, phases, sparsity and FLOPs of runs on one HTML page that opens offline."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, as ``sparsetwin train`` wrote them."""
    out: Path | None = None
    """The page; report.html in the first run folder by default."""
    json: bool = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Report, arguments, command="report")
    if not args.folders:
        print("error: name at least one run folder")
        return 2
    page = write_report(args.folders, args.out or args.folders[0] / "report.html")
    runs = [read_run(folder) for folder in args.folders]
    for folder, run in zip(args.folders, runs, strict=True):
        print(f"{folder}: {verdict(run)}")
    print(f"report: {page}")
    if args.json:
        members = {
            str(f): {r.name: r.accuracy for r in member_rows(run)} for f, run in zip(args.folders, runs, strict=True)
        }
        print_json({"report": str(page), "accuracy": members})
    return 0
