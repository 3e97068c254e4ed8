"""``sparsetwin resume RUN``."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsetwin.cli._call import DataPath, RunPath, Switch, parse
from sparsetwin.cli._description import read_description
from sparsetwin.cli._running import LoggerName, conclude, execute, verify
from sparsetwin.report import write_report
from sparsetwin.training import RunFolder, choose_device
from sparsetwin.training.environment import machine, versions


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a stopped run from its last good checkpoint, to the same bits as if it had not stopped.

    A finished run is verified and left as it is.
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
    if folder.is_finished:
        verify(folder)
        print(f"{folder.path} is finished; its pair is intact: {folder.pair}")
        if not folder.report.exists():  # it was killed between the last line and the page
            write_report([folder.path], folder.report)
        return conclude(folder, as_json=args.json)
    torch.set_num_threads(described.threads)
    _warn_of_other_surroundings(described.plain, device=choose_device(described.recipe.device))
    return execute(
        described.recipe,
        folder,
        data=args.data or described.data,
        loggers=args.logger,
        quiet=args.quiet,
        as_json=args.json,
    )


def _warn_of_other_surroundings(plain: Mapping[str, Any], *, device: torch.device) -> None:
    """Say so if the rest of the run cannot be expected to have the same bits."""
    then = {**plain.get("versions", {}), **plain.get("machine", {})}
    now = {**versions(), **machine(device)}
    changed = [f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in sorted({*then, *now})
               if then.get(name) != now.get(name)]  # fmt: skip
    if changed:
        warnings.warn(
            f"the run goes on, but not to the same bits as if it had not stopped: {'; '.join(changed)}", stacklevel=2
        )
