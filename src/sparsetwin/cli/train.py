"""``sparsetwin train [RECIPE]``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from sparsetwin.cli._call import DataPath, Switch, parse
from sparsetwin.cli._recipe_flags import long_flags, overridden, split_name
from sparsetwin.cli._running import LoggerName, execute
from sparsetwin.errors import ConfigError
from sparsetwin.recipes import Recipe, check_recipe, describe, find_recipe, recipe_from_plain
from sparsetwin.training import Processes, RunFolder, joined_processes
from sparsetwin.training.environment import command_line


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a dense network and its sparse twin from a recipe.

    The recipe's name, or package.module:function of your own, stands first: sparsetwin train RECIPE [OPTIONS].
    digits is the default, and sparsetwin recipes lists them. Every field of a recipe can be overridden; the options
    and defaults below are those of the recipe that is named. --epochs, --sparsity and --dense-finetune are short for
    --train.epochs, --schedule.sparsity and --train.dense-finetune. Several processes train together when torchrun
    starts them: torchrun --nproc-per-node 2 -m sparsetwin train RECIPE; --fsdp is short for --distributed.fsdp.
    --qat and --qat-start are short for --method.qat and --method.qat-start: the sparse half gets ready for int8 values.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: DataPath = None
    """Folder of the data set, if the recipe needs one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Run folder to make; runs/RECIPE by default."""
    logger: tuple[LoggerName, ...] = ()
    """Further loggers."""
    quiet: Switch = False
    """Show no progress."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    given, rest = split_name(arguments)
    name = given or "digits"
    default = find_recipe(name)
    flags = long_flags(rest)
    args = parse(Train, flags, command=f"train {name}", default=Train(recipe=default))
    recipe = overridden(args.recipe, default=default, flags=flags)
    recipe = recipe_from_plain(recipe.plain())  # as `resume` will read it
    recipe.schedule.check_used(recipe.method.name)
    check_recipe(recipe)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with joined_processes(recipe.device) as processes:
        if args.recipe.train.dense_finetune and not recipe.train.dense_finetune and processes.is_first:
            print(f"{recipe.method.name} leaves no dense half that could be trained on, so none is", file=sys.stderr)
        return _train(args, recipe, name=name, processes=processes)


def _train(args: Train, recipe: Recipe, *, name: str, processes: Processes) -> int:
    if recipe.distributed.fsdp and not processes.are_many:
        raise ConfigError(
            "--fsdp shards a model over several processes, but there is one; start them with: "
            f"torchrun --nproc-per-node 2 -m sparsetwin train {name} --fsdp"
        )
    folder = RunFolder(args.out or Path("runs") / name.replace(":", "-"))
    device = processes.device(recipe.device)
    described = describe(recipe, name=name, data=args.data, command=command_line(), device=device, processes=processes)
    made = processes.of_first(lambda: folder.create(described))
    try:
        return execute(
            recipe,
            folder,
            data=args.data,
            loggers=args.logger,
            quiet=args.quiet,
            as_json=args.json,
            processes=processes,
        )
    except BaseException:
        # the corrected command shall find the folder as this one did
        if processes.is_first and folder.is_untrained:
            folder.discard(made)
        raise
