"""``sparsetwin train [RECIPE]``."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from sparsetwin.cli._call import parse
from sparsetwin.cli._running import execute
from sparsetwin.errors import SparsetwinError
from sparsetwin.recipes import Recipe, describe, find_recipe
from sparsetwin.training import RunFolder, choose_device
from sparsetwin.training.environment import command_line

_SHORT = {
    "--dense-finetune": "--train.dense-finetune",
    "--no-dense-finetune": "--train.no-dense-finetune",
    "--epochs": "--train.epochs",
    "--sparsity": "--schedule.sparsity",
}


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a dense network and its sparse twin from a recipe.

    The recipe's name, or package.module:function of your own, stands first; digits is the default.
    Every field of it can be overridden. --epochs, --sparsity and --dense-finetune are short for
    --train.epochs, --schedule.sparsity and --train.dense-finetune.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: Path | None = None
    """Folder of the data set, if the recipe needs one."""
    out: Path | None = None
    """Run folder to make; runs/RECIPE by default."""
    logger: tuple[str, ...] = ()
    """Further loggers: tensorboard, wandb, mlflow."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    name, rest = _recipe_name(arguments)
    args = parse(Train, [_long(arg) for arg in rest], command="train", default=Train(recipe=find_recipe(name)))
    recipe = args.recipe
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    folder = RunFolder(args.out or Path("runs") / name.replace(":", "-"))
    existed = folder.path.exists()
    described = describe(recipe, name=name, data=args.data, command=command_line(), device=choose_device(recipe.device))
    folder.create(described)
    try:
        return execute(recipe, folder, data=args.data, loggers=args.logger, quiet=args.quiet, as_json=args.json)
    except SparsetwinError:
        _leave_no_trace(folder, existed=existed)
        raise


def _recipe_name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return "digits", list(arguments)


def _long(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return _SHORT.get(flag, flag) + equals + value


def _leave_no_trace(folder: RunFolder, *, existed: bool) -> None:
    """Remove a run folder in which nothing was trained, so that the corrected command can be given again."""
    if folder.metrics.exists() or folder.checkpoints.exists():
        return
    folder.description.unlink(missing_ok=True)
    if not existed:
        shutil.rmtree(folder.path, ignore_errors=True)
