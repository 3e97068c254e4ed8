"""Networks that were trained before: to begin from, or to learn from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsetwin.checkpoint import Pair, load_sparse
from sparsetwin.data import Splits
from sparsetwin.errors import CheckpointError, ConfigError, StateError
from sparsetwin.recipes._recipe import Recipe, recipe_from_plain
from sparsetwin.training import OWN, RunFolder

Factory = Callable[[], nn.Module]

_OURS = "sparsetwin"  # key in the metadata of files that this library wrote


def located(recipe: Recipe) -> Recipe:
    """Return the recipe with the paths of trained networks made absolute, so that it means the same anywhere."""
    train = recipe.train
    if train.teacher not in (None, OWN):
        train = dataclasses.replace(train, teacher=str(Path(train.teacher).resolve()))
    pretrained = None if recipe.pretrained is None else str(Path(recipe.pretrained).resolve())
    return dataclasses.replace(recipe, train=train, pretrained=pretrained)


def check_trained(recipe: Recipe) -> None:
    """Refuse, before data are read, trained networks that are not there.

    Raises:
        SparsetwinError: If there is nothing at a path, or a run folder without a dense half.
    """
    teacher = None if recipe.train.teacher == OWN else recipe.train.teacher
    for path, flag in ((recipe.pretrained, "--pretrained"), (teacher, "--train.teacher")):
        if path is not None:
            _check(Path(path), flag)


def trained_weights(path: str) -> Callable[[nn.Module], None]:
    """Return a function that gives a model the weights and statistics of a trained one.

    Args:
        path: A run folder, whose dense half it is, or a file of safetensors. It is read when the function is called.
    """

    def begin(model: nn.Module) -> None:
        where = Path(path)
        _check(where, "--pretrained")
        _fill(model, where)

    return begin


def teacher_from(
    path: str, make: Factory, factory: Callable[..., Factory], splits: Splits, device: torch.device
) -> Factory:
    """Return a function that makes a trained network to distil from, which may be of another architecture.

    Args:
        path: A run folder, whose own recipe says what its network is; or a file of safetensors for the student's.
        make: Makes the student.
        factory: Makes such a function for model settings, splits and a device.
        splits: Give the number of outputs.
        device: Of the networks.

    Raises:
        SparsetwinError: If there is nothing at the path, or a run folder without a dense half.
    """
    where = Path(path)
    _check(where, "--train.teacher")
    if where.is_dir():
        config = RunFolder(where).read().get("config")
        make = factory(recipe_from_plain(config).model, splits, device)

    def taught() -> nn.Module:
        model = make()
        _fill(model, where)
        return model

    return taught


def _check(where: Path, flag: str) -> None:
    if not where.exists():
        needed = "to the end" if flag == "--train.teacher" else "until the first checkpoint"
        raise ConfigError(
            f"{flag}: no trained network at {where.resolve()}; give a run folder or a file of safetensors, "
            f"and leave it there: the run needs it {needed}"
        )
    if where.is_dir():
        RunFolder(where).read()
        members = Pair(RunFolder(where).pair).members
        if "dense" not in members:
            there = ", ".join(str(RunFolder(where).pair / member.file) for member in members.values())
            raise ConfigError(
                f"{flag}: the run in {where} has no dense half"
                + (f"; to use another network, give its file: {there}" if there else " yet; train it first")
            )


def _fill(model: nn.Module, where: Path) -> None:
    if where.is_dir():
        model.load_state_dict(Pair(RunFolder(where).pair).load("dense", model).state_dict())
        return
    tensors = _tensors(where)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        found = "; ".join(line.strip() for line in str(error).splitlines()[1:6])
        raise StateError(f"{where} does not fit the model: {found}") from error


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            is_ours = _OURS in (opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is no file of safetensors: {error}") from error
    return dict(load_sparse(file).tensors) if is_ours else load_file(file)
