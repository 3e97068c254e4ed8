"""What ``train`` and ``resume`` share: signals, loggers, the closing table and the report."""

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from sparsetwin.checkpoint import Pair
from sparsetwin.cli._call import print_json, print_table
from sparsetwin.cli._progress import make_display
from sparsetwin.errors import CheckpointError, SparsityWarning
from sparsetwin.recipes import Recipe, build_run
from sparsetwin.report import HEADINGS, lines, member_rows, read_run, verdict, write_report
from sparsetwin.training import Event, Processes, Progress, Run, RunFolder
from sparsetwin.training.loggers import Logger, make_logger

STOPPED = 130
LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class _ToLogger:
    """Hands events on to a logger."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def event(self, event: Event) -> None:
        """Log an event."""
        self._logger.log(event)

    def progress(self, progress: Progress) -> None:
        """Positions are not logged."""


def execute(
    recipe: Recipe,
    folder: RunFolder,
    *,
    data: Path | None,
    loggers: Sequence[str],
    quiet: bool,
    as_json: bool,
    processes: Processes,
) -> int:
    """Build a run, train it and show what came out.

    Args:
        recipe: The configuration.
        folder: The run folder, with its ``run.json``.
        data: Folder of the data set.
        loggers: Names of further loggers.
        quiet: Show no progress.
        as_json: End with one JSON object.
        processes: Those that train together; the first one shows and logs.

    Returns:
        The exit code.
    """
    if not processes.is_first:
        warnings.simplefilter("ignore", SparsityWarning)  # the first one says the same
        loggers, quiet = (), True
    run = build_run(recipe, folder, data=data, processes=processes)
    with ExitStack() as stack:
        for name in loggers:
            logger = make_logger(name, folder.path)
            stack.callback(logger.close)
            run.listen([_ToLogger(logger)])
        display = make_display(quiet=quiet)
        if display:
            stack.callback(display.close)
            run.listen([display])
        try:
            with _stop_on_signal(run, processes):
                finished = run.execute()
        except KeyboardInterrupt:
            if folder.is_untrained:
                raise
            print(
                f"interrupted; continue from the last checkpoint with: sparsetwin resume {folder.path}", file=sys.stderr
            )
            return STOPPED
    if not processes.is_first:
        return 0 if finished else STOPPED
    if not finished:
        print(f"stopped and saved; continue with: sparsetwin resume {folder.path}", file=sys.stderr)
        if as_json:
            print_json({"run": str(folder.path), "finished": False})
        return STOPPED
    write_report([folder.path], folder.report)
    return conclude(folder, as_json=as_json)


def verify(folder: RunFolder) -> None:
    """Check that a finished run still has every member that it tested, as it was saved.

    Raises:
        CheckpointError: Naming the members that are missing or not the ones that were saved.
    """
    pair = Pair(folder.pair)
    pair.verify()
    final = read_run(folder.path).final
    missing = sorted(set(final.members if final else ()) - set(pair.members))
    if missing:
        raise CheckpointError(f"{folder.pair} lacks members of the finished run: {', '.join(missing)}")


def conclude(folder: RunFolder, *, as_json: bool) -> int:
    """Print the closing table of a finished run."""
    told = read_run(folder.path)
    rows = member_rows(told)
    print_table(HEADINGS, lines(rows))
    print(verdict(told))
    print(f"pair: {folder.pair}\nreport: {folder.report}")
    if as_json:
        print_json({"run": str(folder.path), "finished": True, "members": {row.name: _plain(row) for row in rows}})
    return 0


def _plain(row: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(row).items() if key != "name"}


@contextmanager
def _stop_on_signal(run: Run, processes: Processes) -> Iterator[None]:
    """Let the first interrupt ask for a checkpoint and a stop, and the second one end the process.

    Of several processes each may get a signal more than once, from ``torchrun`` and from others: all but the first are
    passed over. ``torchrun`` itself ends those that take too long.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        for signum in previous:
            signal.signal(signum, signal.SIG_IGN if processes.are_many else signal.default_int_handler)
        if processes.is_first:
            once_more = "" if processes.are_many else "; once more to stop at once"
            print(f"\nstopping after this step{once_more}", file=sys.stderr, flush=True)
        run.request_stop()

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
