"""Small sessions and runs on the digits, built without the command line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin import ACDC
from sparsetwin.data import Digits, Splits
from sparsetwin.distributions import Distribution, Global
from sparsetwin.methods import Method
from sparsetwin.schedules import phases
from sparsetwin.targets import Targets
from sparsetwin.training import (
    LearningRateSettings,
    LoopSettings,
    OptimizerSettings,
    Run,
    RunFolder,
    RunParts,
    Session,
    TrainSettings,
)

CPU = torch.device("cpu")
BATCH = 64
STEPS = 18  # of an epoch


def network(*, batch_norm: bool = False) -> nn.Module:
    """Return a small network for 1x8x8 images."""
    torch.manual_seed(0)
    norm: list[nn.Module] = [nn.BatchNorm2d(8)] if batch_norm else []
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    )


def digits(*, holdout: float = 0.1, seed: int = 0) -> Splits:
    return Digits(holdout=holdout).load(None, batch_size=BATCH, eval_batch_size=512, seed=seed, device=CPU)


def acdc(*lengths: tuple[int, float], distribution: Distribution | None = None) -> Method:
    """Return AC/DC over phases of (steps, sparsity)."""
    return ACDC(schedule=phases(lengths), distribution=distribution or Global())


def settings(
    *, optimizer: OptimizerSettings | None = None, learning_rate: LearningRateSettings | None = None, **train: Any
) -> LoopSettings:
    return LoopSettings(
        optimizer=optimizer or OptimizerSettings(lr=0.05, weight_decay=5e-4),
        learning_rate=learning_rate or LearningRateSettings(shape="constant"),
        train=TrainSettings(**{"epochs": 4, "batch_size": BATCH, **train}),
        steps_per_epoch=STEPS,
    )


def session(method: Method, given: LoopSettings, *, model: nn.Module | None = None) -> Session:
    return Session(model or network(), method, targets=Targets(), settings=given, seed=0)


def train(trained: Session, *, steps: int) -> list[float]:
    """Do steps on the digits and return their losses."""
    losses: list[float] = []
    data = digits().train
    while len(losses) < steps:
        for inputs, labels in data.epoch(len(losses) // len(data)):
            losses.append(float(trained.step(inputs, labels)[0]))
            if len(losses) == steps:
                break
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def make_run(
    folder: Path, method: Method, given: LoopSettings, *, make_model: Callable[[], nn.Module] | None = None,
    splits: Splits | None = None, listeners: tuple[Any, ...] = (),
) -> Run:  # fmt: skip
    """Return a run in a new folder."""
    run_folder = RunFolder(folder)
    run_folder.create({"config": {}})
    parts = RunParts(
        make_model=make_model or (lambda: network(batch_norm=True)),
        splits=splits or digits(),
        method=method,
        targets=Targets(),
        settings=given,
        seed=0,
        device=CPU,
    )
    return Run(run_folder, parts, listeners=listeners)


def without(splits: Splits, **changes: Any) -> Splits:
    return replace(splits, **changes)
