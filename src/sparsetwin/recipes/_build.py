"""From a recipe to a run: data, model, method."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsetwin.data import Splits
from sparsetwin.errors import ConfigError, nearest
from sparsetwin.methods import Method
from sparsetwin.models import MODELS
from sparsetwin.recipes._imports import import_object
from sparsetwin.recipes._recipe import ModelSettings, Recipe
from sparsetwin.recipes._shape import OUTPUTS, check_layers, check_outputs, meta_model
from sparsetwin.recipes._trained import check_trained, located, teacher_from, trained_weights
from sparsetwin.training import (
    ALONE,
    OWN,
    Listener,
    LoopSettings,
    Processes,
    Run,
    RunFolder,
    RunParts,
    check_distributed,
    choose_device,
    finetuning_step,
    has_dense_half,
    make_deterministic,
)
from sparsetwin.training.environment import git_commit, machine, versions

_ANY_STEPS = 10**6  # of an epoch, to look at a schedule before the data are known


def check_recipe(recipe: Recipe) -> None:
    """Refuse, before any data are read, what can be seen to be wrong without them.

    Raises:
        SparsetwinError: If the model, an option of it or the schedule cannot be had as asked.
    """
    _constructor(recipe.model)
    model = meta_model(recipe) if recipe.model.name in MODELS else None
    check_trained(recipe)
    device = choose_device(recipe.device)
    if not recipe.train.test and not getattr(recipe.dataset, "holdout", True):
        raise ConfigError("a run that is not tested is judged by a hold-out, but there is none: --dataset.holdout 0.1")
    check_distributed(recipe.distributed, recipe.train, device=device)
    if recipe.method.name != "dense":
        recipe.schedule.check_phases(is_asked=False)
    method = _planned_method(recipe)
    if method is not None and model is not None:
        check_layers(recipe, method, model)
    if method is not None and recipe.train.dense_finetune:
        finetuning_step(method)


def leaves_dense_half(recipe: Recipe) -> bool:
    """Return whether a dense half comes out of a recipe that could be trained on; True if only the data can tell.

    Raises:
        SparsetwinError: If the method or the schedule cannot be had as asked.
    """
    method = _planned_method(recipe)
    if method is None:
        return True
    try:
        finetuning_step(method)
    except ConfigError:
        return False
    return has_dense_half(method)


def _planned_method(recipe: Recipe) -> Method | None:
    """Return the method as for an epoch of any number of steps; None if lengths in steps have to wait for the data."""
    if recipe.schedule.unit == "steps" and recipe.schedule.paper is None and recipe.method.name != "dense":
        return None
    return recipe.method.build(recipe.schedule, steps_per_epoch=_ANY_STEPS, epochs=recipe.train.epochs)


def model_factory(settings: ModelSettings, splits: Splits, device: torch.device) -> Callable[[], nn.Module]:
    """Return a function that builds the model on the device, its outputs as many as the data have classes.

    Raises:
        ConfigError: If the model or an option is unknown, or an option is missing or leaves too few outputs.
    """
    check_outputs(settings, classes=splits.classes)
    constructor, accepted = _constructor(settings)
    options = dict(settings.options)
    for outputs in OUTPUTS:
        if outputs in accepted:
            options.setdefault(outputs, splits.classes)
    for option, parameter in accepted.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and option not in options:
            raise ConfigError(f"{settings.name} needs the option {option!r}: --model.options {option}=VALUE")

    def make() -> nn.Module:
        model = constructor(**options)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{settings.name} returned a {type(model).__name__}, not a torch.nn.Module")
        if not any(True for _ in model.parameters()):
            raise ConfigError(f"{settings.name} has no parameters to train")
        return model.to(device)

    return make


def options_of(settings: ModelSettings) -> tuple[str, ...]:
    """Return the options that a network takes.

    Raises:
        ConfigError: If the network is unknown.
    """
    return tuple(_constructor(settings)[1])


def _constructor(settings: ModelSettings) -> tuple[Callable[..., Any], Mapping[str, inspect.Parameter]]:
    """Return what builds a network, and the parameters that it takes."""
    if ":" in settings.name:
        constructor = import_object(settings.name)
    elif settings.name in MODELS:
        constructor = MODELS[settings.name]
    else:
        raise ConfigError(
            f"unknown model {settings.name!r}; known: {', '.join(MODELS)}, or module:callable"
            f"{nearest(settings.name, MODELS)}"
        )
    if not callable(constructor):
        raise ConfigError(f"{settings.name} is a {type(constructor).__name__}, which cannot be called to build a model")
    try:
        accepted = inspect.signature(constructor).parameters
    except ValueError as error:
        raise ConfigError(f"{settings.name} does not tell its parameters; wrap it in a function") from error
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        for option in settings.options:
            if option not in accepted:
                raise ConfigError(
                    f"{settings.name} has no option {option!r}; it has: {', '.join(accepted) or 'none'}"
                    f"{nearest(option, accepted)}"
                )
    return constructor, accepted


def build_run(
    recipe: Recipe,
    folder: RunFolder,
    *,
    data: Path | None,
    listeners: Sequence[Listener] = (),
    processes: Processes = ALONE,
) -> Run:
    """Read the data and put a run together in its folder, which has its ``run.json`` already.

    Args:
        recipe: The configuration.
        folder: The run folder.
        data: Folder of the data set, if it needs one.
        listeners: Told what happens.
        processes: Those that train together, of which each builds its own.

    Raises:
        SparsetwinError: If data, model, schedule or targets cannot be had as asked.
    """
    device = processes.device(recipe.device)
    make_deterministic(deterministic=recipe.train.deterministic)
    splits = processes.first_alone(
        lambda: recipe.dataset.load(
            data,
            batch_size=recipe.train.batch_size,
            eval_batch_size=recipe.train.eval_batch_size,
            seed=recipe.seed,
            device=device,
        )
    )
    steps_per_epoch = len(splits.train)
    processes.check_batches(splits.train, batch_size=recipe.train.batch_size, cuts=recipe.train.accumulation)
    make = model_factory(recipe.model, splits, device)
    teacher = recipe.train.teacher
    if teacher is not None and recipe.distributed.fsdp:
        raise ConfigError("--train.teacher does not work with --fsdp; leave one of them out")
    method = recipe.method.build(recipe.schedule, steps_per_epoch=steps_per_epoch, epochs=recipe.train.epochs)
    if recipe.method.per_layer and folder.is_untrained:  # what earlier releases began goes on
        check_layers(recipe, method, model_factory(recipe.model, splits, torch.device("meta"))())
    parts = RunParts(
        make_model=make,
        begin_with=None if recipe.pretrained is None else trained_weights(recipe.pretrained),
        make_teacher=None if teacher in (None, OWN) else teacher_from(teacher, make, model_factory, splits, device),
        splits=splits,
        method=method,
        targets=recipe.targets.build(),
        settings=LoopSettings(
            optimizer=recipe.optimizer,
            learning_rate=recipe.learning_rate,
            train=recipe.train,
            steps_per_epoch=steps_per_epoch,
            distributed=recipe.distributed,
        ),
        seed=recipe.seed,
        device=device,
        processes=processes,
    )
    return Run(folder, parts, listeners=listeners)


def describe(
    recipe: Recipe, *, name: str, data: Path | None, command: str, device: torch.device, processes: Processes = ALONE
) -> Mapping[str, Any]:
    """Return what ``run.json`` holds: the whole configuration, seed, threads, versions, commit and machine."""
    return {
        **({"processes": processes.count} if processes.are_many else {}),
        "recipe": name,
        "config": located(recipe).plain(),
        "data": None if data is None else str(data.resolve()),
        "command": command,
        "seed": recipe.seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(device),
    }
