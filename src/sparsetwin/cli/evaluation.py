"""``sparsetwin eval RUN``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from sparsetwin.checkpoint import Member, Pair
from sparsetwin.cli._call import DataPath, RunPath, Switch, parse, print_json
from sparsetwin.cli._description import read_description
from sparsetwin.errors import CheckpointError, UsageError, nearest
from sparsetwin.recipes import model_factory
from sparsetwin.training import RunFolder, choose_device, evaluate, make_deterministic, seed_everything


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate one half of a pair."""

    folder: RunPath
    """Run folder, as sparsetwin train wrote it."""
    half: str = "sparse"
    """Member of the pair: sparse, dense, or another that the run saved, such as sparse-best."""
    split: Literal["test", "holdout"] = "test"
    """Which samples."""
    data: DataPath = None
    """Folder of the data set, if it moved."""
    device: Annotated[str | None, tyro.conf.arg(metavar="DEVICE")] = None
    """Another device than the run's: auto, cpu, cuda or cuda:N."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Eval, arguments, command="eval")
    folder = RunFolder(args.folder)
    described = read_description(folder)
    recipe, train = described.recipe, described.recipe.train
    pair = Pair(folder.pair)
    member = _member(pair, args.half)
    torch.set_num_threads(described.threads)
    make_deterministic(deterministic=train.deterministic)
    device = choose_device(args.device or recipe.device)
    splits = recipe.dataset.load(
        args.data or described.data,
        batch_size=train.batch_size,
        eval_batch_size=train.eval_batch_size,
        seed=recipe.seed,
        device=device,
    )
    batches = splits.test if args.split == "test" else splits.holdout
    if not len(batches):
        raise UsageError(f"the {args.split} split of this run has no samples")
    seed_everything(recipe.seed)
    model = pair.load(member.name, model_factory(recipe.model, splits, device)())
    score = evaluate(model, batches.epoch(0), precision=train.precision, channels_last=train.channels_last)
    print(
        f"{member.name} half, {args.split}: accuracy {score.accuracy:.2%}, loss {score.loss:.4f}, "
        f"sparsity {member.sparsity:.2%} ({member.kept:,} of {member.targets:,} target weights kept)"
    )
    if args.json:
        counts = {"sparsity": member.sparsity, "kept": member.kept, "targets": member.targets}
        print_json({"half": member.name, "split": args.split, **score.plain(), **counts})
    return 0


def _member(pair: Pair, name: str) -> Member:
    """Look the member up before the data are read."""
    members = pair.members
    if not members:
        raise CheckpointError(f"{pair.folder} has no members yet; the first is saved when the first phase ends")
    if name not in members:
        raise CheckpointError(f"no half {name!r} in {pair.folder}; it has {', '.join(members)}{nearest(name, members)}")
    return members[name]
