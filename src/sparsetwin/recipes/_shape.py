"""The shape of a recipe's network and data, known before any data are read."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.data import CharText, Cifar10, Cifar100, DataSource, Digits, ImageNet
from sparsetwin.distributions import PerLayer
from sparsetwin.errors import ConfigError, SparsetwinError
from sparsetwin.methods import Method
from sparsetwin.models import MODELS
from sparsetwin.recipes._recipe import ModelSettings, Recipe

OUTPUTS = ("num_classes", "vocabulary")
"""Options of networks that are the number of classes unless they are given."""

_IMAGES: dict[type[DataSource], tuple[int, int, int]] = {
    Digits: (1, 8, 8),
    Cifar10: (3, 32, 32),
    Cifar100: (3, 32, 32),
    ImageNet: (3, 224, 224),
}  # (channels, height, width)
_CLASSES: dict[type[DataSource], int] = {Digits: 10, Cifar10: 10, Cifar100: 100, ImageNet: 1000}
_TRAINING_SET: dict[type[DataSource], int] = {Digits: 1344, Cifar10: 50_000, Cifar100: 50_000, ImageNet: 1_281_167}
_CHARACTERS = 65  # of Tiny Shakespeare


def meta_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's network without any memory for its weights.

    Raises:
        ConfigError: If the network is not one of the library's own, or an option is wrong.
    """
    name = recipe.model.name
    if name not in MODELS:
        raise ConfigError(f"the FLOPs of {name} are known to train only; known here: {', '.join(MODELS)}")
    options: dict[str, Any] = dict(recipe.model.options)
    if name == "gpt":
        options.setdefault("vocabulary", _CHARACTERS)
    elif type(recipe.dataset) in _CLASSES:
        check_outputs(recipe.model, classes=_CLASSES[type(recipe.dataset)])
        options.setdefault("num_classes", _CLASSES[type(recipe.dataset)])
    try:
        with torch.device("meta"):
            return MODELS[name](**options)
    except SparsetwinError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # what Python and torch say of a value of the wrong kind
        given = " ".join(f"{option}={value!r}" for option, value in recipe.model.options.items())
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{name} cannot be built with --model.options {given}: {said}") from error


def check_layers(recipe: Recipe, method: Method, model: nn.Module) -> None:
    """Refuse sparsities of layers that a schedule would not end with, but scale to its own.

    Args:
        recipe: Gives them, and says which parameters are targets.
        method: Of the recipe, with a schedule in any unit.
        model: Its network; no value of a parameter is read.

    Raises:
        ConfigError: If the schedule ends at another sparsity than the layers have together; it says which.
        TargetError: If a layer has no sparsity or several, or a name matches none.
    """
    if not recipe.method.per_layer:
        return
    targets = recipe.targets.build().resolve(model)
    layers = PerLayer(recipe.method.per_layer)
    overall = layers.overall_sparsity({name: tuple(weight.shape) for name, weight in targets.items()})
    final = method.schedule.final_sparsity
    if math.isclose(overall, final, rel_tol=0.0, abs_tol=1e-9):  # as `PerLayer` compares them
        return
    wanted = f"{overall:.9f}".rstrip("0").rstrip(".")
    if recipe.schedule.phases:
        instead = f"let the last sparse phase of --schedule.phases have {wanted}"
    else:
        instead = f"add --schedule.sparsity {wanted}"
    raise ConfigError(
        f"the layers of --method.per-layer have a sparsity of {wanted} together, the schedule {final:.9g}, to which "
        f"theirs would be scaled; {instead}, or give the layers other ones"
    )


def check_outputs(settings: ModelSettings, *, classes: int) -> None:
    """Refuse a network of the library's own with fewer outputs than the data have classes.

    Raises:
        ConfigError: Naming the option.
    """
    for name in OUTPUTS:
        given = settings.options.get(name)
        if settings.name in MODELS and isinstance(given, int) and given < classes:
            raise ConfigError(
                f"{settings.name} with --model.options {name}={given} has too few outputs for data of {classes} "
                "classes; leave it out to have as many"
            )


def example_input(dataset: DataSource) -> Tensor:
    """Return one sample of a data set's shape, without reading the data set.

    Raises:
        ConfigError: If the shape is known to a run only.
    """
    if isinstance(dataset, CharText):
        return torch.zeros(1, dataset.context, dtype=torch.int64, device="meta")
    if type(dataset) not in _IMAGES:
        raise ConfigError(f"the shape of {type(dataset).__name__} samples is known to train only")
    return torch.zeros(1, *_IMAGES[type(dataset)], device="meta")


def training_samples(dataset: DataSource) -> int | None:
    """Return how many samples an epoch trains on, without reading the data set; of a text each character is one.

    >>> training_samples(Digits()), training_samples(Cifar10(samples=500))
    (1210, 450)

    Returns:
        None where only reading the data set tells.
    """
    given: int | None = getattr(dataset, "samples", None)
    if isinstance(dataset, CharText):
        return None if given is None else given * dataset.context
    there = _TRAINING_SET.get(type(dataset))
    if there is None:
        return None
    there = there if given is None else min(given, there)
    held: float = getattr(dataset, "holdout", 0.0)
    return there - round(held * there)
