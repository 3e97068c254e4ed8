"""``sparsetwin resume RUN``."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsetwin.cli._call import DataPath, RunPath, Switch, parse
from sparsetwin.cli._description import Description, read_description
from sparsetwin.cli._running import LoggerName, conclude, execute, verify
from sparsetwin.report import write_report
from sparsetwin.training import Processes, RunFolder, joined_processes
from sparsetwin.training.environment import machine, versions


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a stopped run from its last good checkpoint, to the same bits as if it had not stopped.

    Started by torchrun, several processes go on together; as many as before give the same bits. A finished run is
    verified and left as it is.
    """

    folder: RunPath
    """Run folder, as sparsetwin train wrote it."""
    data: DataPath = None
    """Folder of the data set, if it moved."""
    logger: tuple[LoggerName, ...] = ()
    """Further loggers."""
    quiet: Switch = False
    """Show no progress."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Resume, arguments, command="resume")
    folder = RunFolder(args.folder)
    described = read_description(folder)
    with joined_processes(described.recipe.device) as processes:
        if processes.of_first(lambda: folder.is_finished):
            return _verify(folder, as_json=args.json) if processes.is_first else 0
        return _resume(args, folder, described, processes)


def _verify(folder: RunFolder, *, as_json: bool) -> int:
    verify(folder)
    print(f"{folder.path} is finished; its pair is intact: {folder.pair}")
    if not folder.report.exists():  # it was killed between the last line and the page
        write_report([folder.path], folder.report)
    return conclude(folder, as_json=as_json)


def _resume(args: Resume, folder: RunFolder, described: Description, processes: Processes) -> int:
    torch.set_num_threads(described.threads)
    if processes.is_first:
        _warn_of_other_surroundings(described.plain, processes, device=processes.device(described.recipe.device))
    return execute(
        described.recipe,
        folder,
        data=args.data or described.data,
        loggers=args.logger,
        quiet=args.quiet,
        as_json=args.json,
        processes=processes,
    )


def _warn_of_other_surroundings(plain: Mapping[str, Any], processes: Processes, *, device: torch.device) -> None:
    """Say so if the rest of the run cannot be expected to have the same bits."""
    then = {**plain.get("versions", {}), **plain.get("machine", {}), "processes": plain.get("processes", 1)}
    now = {**versions(), **machine(device), "processes": processes.count}
    changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in sorted({*then, *now})
               if then.get(name) != now.get(name)]  # fmt: skip
    if changed:
        warnings.warn(
            f"the run goes on, but not to the same bits as if it had not stopped: {'; '.join(changed)}", stacklevel=2
        )
