"""What ``train`` and ``resume`` share: signals, loggers, the closing table and the report."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sparsetwin.cli._call import print_json, print_table
from sparsetwin.cli._progress import make_display
from sparsetwin.recipes import Recipe, build_run
from sparsetwin.report import HEADINGS, cells, member_rows, read_run, verdict, write_report
from sparsetwin.training import Event, Progress, Run, RunFolder
from sparsetwin.training.loggers import Logger, make_logger

STOPPED = 130


class _ToLogger:
    """Hands events on to a logger."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def event(self, event: Event) -> None:
        """Log an event."""
        self.logger.log(event)

    def progress(self, progress: Progress) -> None:
        """Positions are not logged."""


def execute(
    recipe: Recipe, folder: RunFolder, *, data: Path | None, loggers: Sequence[str], quiet: bool, as_json: bool
) -> int:
    """Build a run, train it and show what came out.

    Args:
        recipe: The configuration.
        folder: The run folder, with its ``run.json``.
        data: Folder of the data set.
        loggers: Names of further loggers.
        quiet: Show no progress.
        as_json: End with one JSON object.

    Returns:
        The exit code.
    """
    run = build_run(recipe, folder, data=data)
    if run.is_finished:
        run.pair.verify()
        print(f"{folder.path} is finished; its pair is intact: {folder.pair}")
        return conclude(folder, as_json=as_json)
    display = make_display(quiet=quiet)
    attached = [_ToLogger(make_logger(name, folder.path)) for name in loggers]
    run.listen([*([display] if display else []), *attached])
    try:
        with _stop_on_signal(run):
            finished = run.execute()
    finally:
        if display:
            display.close()
        for listener in attached:
            listener.logger.close()
    if not finished:
        print(f"\nstopped and saved; continue with: sparsetwin resume {folder.path}", file=sys.stderr)
        return STOPPED
    return conclude(folder, as_json=as_json)


def conclude(folder: RunFolder, *, as_json: bool) -> int:
    """Print the closing table and write the report of a finished run."""
    told = read_run(folder.path)
    write_report([folder.path], folder.report)
    rows = member_rows(told)
    print_table(HEADINGS, [cells(row) for row in rows])
    print(verdict(told))
    print(f"pair: {folder.pair}\nreport: {folder.report}")
    if as_json:
        print_json({"run": str(folder.path), "members": {row.name: _plain(row) for row in rows}})
    return 0


def _plain(row: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(row).items() if key != "name"}


@contextmanager
def _stop_on_signal(run: Run) -> Iterator[None]:
    """Let the first interrupt ask for a checkpoint and a stop, and the second one end the process."""

    def handle(number: int, frame: FrameType | None) -> None:
        for signum in previous:
            signal.signal(signum, previous[signum])
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        run.request_stop()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
