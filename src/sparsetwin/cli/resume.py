"""``sparsetwin resume RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from sparsetwin.cli._call import parse
from sparsetwin.cli._running import execute
from sparsetwin.errors import CheckpointError
from sparsetwin.recipes import Recipe, recipe_from_plain
from sparsetwin.training import RunFolder


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Continue a stopped run from its last good checkpoint, to the same bits as if it had not stopped.

    A finished run is verified and left as it is.
    """

    folder: tyro.conf.Positional[Path]
    """Run folder, as ``sparsetwin train`` wrote it."""
    data: Path | None = None
    """Folder of the data set, if it moved."""
    logger: tuple[str, ...] = ()
    """Further loggers: tensorboard, wandb, mlflow."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Resume, arguments, command="resume")
    folder = RunFolder(args.folder)
    recipe, described = read_description(folder)
    torch.set_num_threads(described["threads"])
    return execute(
        recipe,
        folder,
        data=args.data or data_folder(described),
        loggers=args.logger,
        quiet=args.quiet,
        as_json=args.json,
    )


def read_description(folder: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe and everything else that ``run.json`` holds.

    Raises:
        CheckpointError: If there is no run, or its description lacks something.
    """
    described = folder.read()
    for key in ("config", "threads", "recipe"):
        if key not in described:
            raise CheckpointError(f"{folder.description} lacks {key!r}")
    return recipe_from_plain(described["config"]), described


def data_folder(described: dict[str, Any]) -> Path | None:
    """Return the data folder that a run was trained from."""
    return Path(described["data"]) if described.get("data") else None
