"""``sparsetwin eval RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from sparsetwin.checkpoint import Pair
from sparsetwin.cli._call import parse, print_json
from sparsetwin.cli.resume import data_folder, read_description
from sparsetwin.recipes import model_factory
from sparsetwin.training import RunFolder, choose_device, evaluate, make_deterministic


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate one half of a pair."""

    folder: tyro.conf.Positional[Path]
    """Run folder, as ``sparsetwin train`` wrote it."""
    half: str = "sparse"
    """Member of the pair: sparse, dense, or another that the run saved."""
    split: Literal["test", "holdout"] = "test"
    """Which samples."""
    data: Path | None = None
    """Folder of the data set, if it moved."""
    device: str | None = None
    """Another device than the run's."""
    json: bool = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Eval, arguments, command="eval")
    folder = RunFolder(args.folder)
    recipe, described = read_description(folder)
    torch.set_num_threads(described["threads"])
    make_deterministic(deterministic=recipe.train.deterministic)
    device = choose_device(args.device or recipe.device)
    splits = recipe.dataset.load(
        args.data or data_folder(described),
        batch_size=recipe.train.batch_size,
        eval_batch_size=recipe.train.eval_batch_size,
        seed=recipe.seed,
        device=device,
    )
    pair = Pair(folder.pair)
    model = pair.load(args.half, model_factory(recipe.model, splits, device)())
    member = pair.members[args.half]
    score = evaluate(
        model,
        getattr(splits, args.split).epoch(0),
        precision=recipe.train.precision,
        channels_last=recipe.train.channels_last,
    )
    print(
        f"{args.half} half, {args.split}: accuracy {score.accuracy:.2%}, loss {score.loss:.4f}, "
        f"sparsity {member.sparsity:.2%} ({member.kept:,} of {member.targets:,} target weights kept)"
    )
    if args.json:
        print_json(
            {
                "half": args.half,
                "split": args.split,
                "accuracy": score.accuracy,
                "loss": score.loss,
                "sparsity": member.sparsity,
                "kept": member.kept,
                "targets": member.targets,
            }
        )
    return 0
