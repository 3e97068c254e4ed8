"""``sparsetwin report RUN [RUN ...]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsetwin.cli._call import Switch, parse, print_json
from sparsetwin.report import member_rows, read_run, verdict, write_report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw loss, accuracy, phases, sparsity and FLOPs of one or several runs on one HTML page that opens offline."""

    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
    """Run folder, as sparsetwin train wrote it."""
    others: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN ..."), tyro.conf.Positional] = ()
    """Further runs to compare it with."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The page to write; of one run by default report.html in its folder, of several report.html here."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Report, arguments, command="report")
    folders = [args.run, *args.others]
    page = write_report(folders, args.out or (Path() if args.others else args.run) / "report.html")
    runs = {str(folder): read_run(folder) for folder in folders}
    for name, run in runs.items():
        print(f"{name}: {verdict(run)}")
    print(f"report: {page}")
    if args.json:
        accuracy = {name: {row.name: row.accuracy for row in member_rows(run)} for name, run in runs.items()}
        print_json({"report": str(page), "accuracy": accuracy})
    return 0
