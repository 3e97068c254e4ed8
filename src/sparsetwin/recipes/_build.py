"""From a recipe to a run: data, model, method."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetwin.data import Splits
from sparsetwin.errors import ConfigError, nearest
from sparsetwin.models import MODELS
from sparsetwin.recipes._recipe import ModelSettings, Recipe
from sparsetwin.training import (
    Listener,
    LoopSettings,
    Run,
    RunFolder,
    RunParts,
    choose_device,
    make_deterministic,
)
from sparsetwin.training.environment import git_commit, machine, versions


def import_object(reference: str) -> Any:
    """Return what ``package.module:name`` refers to.

    Raises:
        ConfigError: If it is not of that form, or there is no such module or name.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise ConfigError(f"expected package.module:name, got {reference!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"cannot import {module_name!r} of {reference!r}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{module_name} has no {name!r}{nearest(name, dir(module))}")
    return getattr(module, name)


def model_factory(settings: ModelSettings, splits: Splits, device: torch.device) -> Callable[[], nn.Module]:
    """Return a function that builds the model on the device, its outputs as many as the data have classes.

    Raises:
        ConfigError: If the model or an option is unknown.
    """
    if ":" in settings.name:
        constructor = import_object(settings.name)
    elif settings.name in MODELS:
        constructor = MODELS[settings.name]
    else:
        raise ConfigError(
            f"unknown model {settings.name!r}; known: {', '.join(MODELS)}, or module:callable"
            f"{nearest(settings.name, MODELS)}"
        )
    accepted = inspect.signature(constructor).parameters
    options = dict(settings.options)
    for outputs in ("num_classes", "vocabulary"):
        if outputs in accepted:
            options.setdefault(outputs, splits.classes)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        for option in options:
            if option not in accepted:
                raise ConfigError(f"{settings.name} has no option {option!r}{nearest(option, accepted)}")

    def make() -> nn.Module:
        model = constructor(**options)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{settings.name} returned a {type(model).__name__}, not a torch.nn.Module")
        return model.to(device)

    return make


def build_run(recipe: Recipe, folder: RunFolder, *, data: Path | None, listeners: Sequence[Listener] = ()) -> Run:
    """Read the data and put a run together in its folder, which has its ``run.json`` already.

    Args:
        recipe: The configuration.
        folder: The run folder.
        data: Folder of the data set, if it needs one.
        listeners: Told what happens.

    Raises:
        SparsetwinError: If data, model, schedule or targets cannot be had as asked.
    """
    device = choose_device(recipe.device)
    make_deterministic(deterministic=recipe.train.deterministic)
    splits = recipe.dataset.load(
        data,
        batch_size=recipe.train.batch_size,
        eval_batch_size=recipe.train.eval_batch_size,
        seed=recipe.seed,
        device=device,
    )
    steps_per_epoch = len(splits.train)
    parts = RunParts(
        make_model=model_factory(recipe.model, splits, device),
        splits=splits,
        method=recipe.method.build(recipe.schedule, steps_per_epoch=steps_per_epoch, epochs=recipe.train.epochs),
        targets=recipe.targets.build(),
        settings=LoopSettings(
            optimizer=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            train=recipe.train,
            steps_per_epoch=steps_per_epoch,
        ),
        seed=recipe.seed,
        device=device,
    )
    return Run(folder, parts, listeners=listeners)


def describe(recipe: Recipe, *, name: str, data: Path | None, command: str, device: torch.device) -> Mapping[str, Any]:
    """Return what ``run.json`` holds: the whole configuration, seed, threads, versions, commit and machine."""
    return {
        "recipe": name,
        "config": recipe.plain(),
        "data": None if data is None else str(data.resolve()),
        "command": command,
        "seed": recipe.seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(device),
    }
