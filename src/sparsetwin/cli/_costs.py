"""What a recipe's schedule costs, known before anything is trained."""

from typing import Any

import torch
from torch import nn

from sparsetwin.data import CharText, Cifar10, Cifar100, DataSource, Digits, ImageNet
from sparsetwin.errors import ConfigError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.models import MODELS
from sparsetwin.recipes import Recipe
from sparsetwin.schedules import Schedule
from sparsetwin.training import branch_step

_IMAGES: dict[type[DataSource], tuple[int, int, int]] = {
    Digits: (1, 8, 8),
    Cifar10: (3, 32, 32),
    Cifar100: (3, 32, 32),
    ImageNet: (3, 224, 224),
}  # (channels, height, width)
_CLASSES: dict[type[DataSource], int] = {Digits: 10, Cifar10: 10, Cifar100: 100, ImageNet: 1000}
_CHARACTERS = 65  # of Tiny Shakespeare


def density_costs(schedule: Schedule) -> dict[str, float]:
    """Return the costs of a schedule over those of a dense run, as if all FLOPs were those of target weights."""
    total = schedule.total_steps
    density = sum(phase.steps * (1 - phase.sparsity) for phase in schedule.phases) / total
    return {"training_flops_over_dense": density, "inference_flops_over_dense": 1 - schedule.final_sparsity}


def recipe_costs(schedule: Schedule, recipe: Recipe) -> dict[str, float]:
    """Return the costs of a recipe at the same sparsity in every target layer, as the paper's uniform runs have it.

    Args:
        schedule: Of the recipe, in any unit.
        recipe: Its network, data, targets and fine-tuning.

    Raises:
        ConfigError: If the network or the shape of the data is known to a run only.
    """
    model = _model(recipe)
    forward = count_forward_flops(model, _example(recipe.dataset))
    targets = recipe.targets.build().resolve(model)

    def flops(sparsity: float) -> int:
        counts = {
            name: size - round(sparsity * size) if name in targets else size
            for name, size in forward.weight_sizes.items()
        }
        return forward.total(counts)

    dense = schedule.total_steps * forward.total()
    trained = sum(phase.steps * flops(phase.sparsity) for phase in schedule.phases)
    costs = {
        "training_flops_over_dense": trained / dense,
        "inference_flops_over_dense": flops(schedule.final_sparsity) / forward.total(),
        "dense_forward_flops": float(forward.total()),
        "target_weights": float(sum(weight.numel() for weight in targets.values())),
    }
    if recipe.train.dense_finetune:
        costs["dense_finetune_flops_over_dense"] = 1 - branch_step(schedule) / schedule.total_steps
    return costs


def _model(recipe: Recipe) -> nn.Module:
    name = recipe.model.name
    if name not in MODELS:
        raise ConfigError(f"the FLOPs of {name} are known to train only; known here: {', '.join(MODELS)}")
    options: dict[str, Any] = dict(recipe.model.options)
    if name == "gpt":
        options.setdefault("vocabulary", _CHARACTERS)
    elif type(recipe.dataset) in _CLASSES:
        options.setdefault("num_classes", _CLASSES[type(recipe.dataset)])
    with torch.device("meta"):
        return MODELS[name](**options)


def _example(dataset: DataSource) -> torch.Tensor:
    """Return one sample of a data set's shape, without reading the data set."""
    if isinstance(dataset, CharText):
        return torch.zeros(1, dataset.context, dtype=torch.int64, device="meta")
    if type(dataset) not in _IMAGES:
        raise ConfigError(f"the shape of {type(dataset).__name__} samples is known to train only")
    return torch.zeros(1, *_IMAGES[type(dataset)], device="meta")
