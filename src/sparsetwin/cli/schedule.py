"""``sparsetwin schedule [RECIPE]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from sparsetwin.cli._call import parse, print_json, print_table
from sparsetwin.data import CharText, Cifar10, Cifar100, DataSource, Digits, ImageNet
from sparsetwin.errors import ConfigError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.models import MODELS
from sparsetwin.recipes import Recipe, ScheduleSettings, find_recipe
from sparsetwin.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Print the phases of a schedule and what they cost, before anything is trained.

    A recipe's name may stand first: its schedule and its network's FLOPs are then shown. FLOPs are those of the same
    sparsity in every layer; what a global ranking leaves is known only after training, and costs more.
    """

    schedule: Annotated[ScheduleSettings, tyro.conf.arg(name="")]
    epochs: int = 100
    """Length of the run."""
    json: bool = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    recipe, rest = None, list(arguments)
    settings = ScheduleSettings(warmup=10, sparse=5, dense=5, final_dense=10, final_sparse=15)
    epochs = 100
    if rest and not rest[0].startswith("-"):
        recipe = find_recipe(rest.pop(0))
        settings, epochs = recipe.schedule, recipe.train.epochs
    args = parse(Plan, rest, command="schedule", default=Plan(schedule=settings, epochs=epochs))
    schedule = args.schedule.build(steps_per_epoch=1, epochs=args.epochs) if _is_whole(args) else _fine(args)
    scale = args.epochs / schedule.total_steps
    rows = [
        [
            str(p.index),
            "sparse" if p.is_sparse else "dense",
            f"{p.start * scale:g}",
            f"{p.stop * scale:g}",
            f"{p.sparsity:g}",
        ]
        for p in schedule.phases
    ]
    print_table(["phase", "kind", "from epoch", "to epoch", "sparsity"], rows)
    values = _costs(schedule, recipe)
    print("\n".join(f"{key.replace('_', ' ')}: {value:.4g}" for key, value in values.items()))
    if args.json:
        phases = [[p.start * scale, p.stop * scale, p.sparsity] for p in schedule.phases]
        print_json({"epochs": args.epochs, "phases": phases, **values})
    return 0


def _is_whole(args: Plan) -> bool:
    """Whether every length is a whole number of epochs, so that a phase table in epochs is exact."""
    given = args.schedule
    lengths = [given.warmup, given.sparse, given.dense, given.final_dense, given.final_sparse]
    lengths += [length for length, _ in given.phases]
    return args.schedule.unit == "epochs" and all(length == int(length) for length in lengths)


def _fine(args: Plan) -> Schedule:
    if args.schedule.unit == "steps":
        raise ConfigError("lengths in steps say nothing about epochs before the data are known; give them in epochs")
    return args.schedule.build(steps_per_epoch=1000, epochs=args.epochs)


def _costs(schedule: Schedule, recipe: Recipe | None) -> dict[str, float]:
    """Return what is known before training: ratios to a dense run, and the network's FLOPs if there is one."""
    total = schedule.total_steps
    if recipe is None:
        density = sum(phase.steps * (1 - phase.sparsity) for phase in schedule.phases) / total
        return {"training_flops_over_dense": density, "inference_flops_over_dense": 1 - schedule.final_sparsity}
    if recipe.model.name not in MODELS:
        raise ConfigError(f"the FLOPs of {recipe.model.name} are known to `train` only; known: {', '.join(MODELS)}")
    with torch.device("meta"):
        model = MODELS[recipe.model.name](**_options(recipe))
    forward = count_forward_flops(model, _example(recipe.dataset, recipe))
    targets = recipe.targets.build().resolve(model)

    def flops(sparsity: float) -> int:
        counts = {
            name: size - round(sparsity * size) if name in targets else size
            for name, size in forward.weight_sizes.items()
        }
        return forward.total(counts)

    trained = sum(phase.steps * flops(phase.sparsity) for phase in schedule.phases)
    return {
        "training_flops_over_dense": trained / (total * forward.total()),
        "inference_flops_over_dense": flops(schedule.final_sparsity) / forward.total(),
        "dense_forward_flops": float(forward.total()),
    }


def _options(recipe: Recipe) -> dict[str, object]:
    options = dict(recipe.model.options)
    if recipe.model.name == "gpt":
        options.setdefault("vocabulary", 65)
    return options


def _example(dataset: DataSource, recipe: Recipe) -> torch.Tensor:
    """Return one sample of a data set's shape, without reading the data set."""
    if isinstance(dataset, CharText):
        return torch.zeros(1, dataset.context, dtype=torch.int64, device="meta")
    shapes = {Digits: (1, 8, 8), Cifar10: (3, 32, 32), Cifar100: (3, 32, 32), ImageNet: (3, 224, 224)}
    if type(dataset) not in shapes:
        raise ConfigError(f"the shape of {type(dataset).__name__} samples is known to `train` only")
    return torch.zeros(1, *shapes[type(dataset)], device="meta")
