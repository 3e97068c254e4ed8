"""Runs of a few steps on a tiny network and random numbers, for any method; costs can be counted by hand."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trials import CPU

from sparsetwin.data import Splits
from sparsetwin.distributions import Uniform
from sparsetwin.methods import METHODS, Method
from sparsetwin.recipes import MethodSettings, ScheduleSettings
from sparsetwin.schedules import Schedule, alternating, periodic, phases, rounds
from sparsetwin.targets import Targets
from sparsetwin.training import (
    LearningRateSettings,
    LoopSettings,
    OptimizerSettings,
    Run,
    RunFolder,
    RunParts,
    TrainSettings,
)

BATCH, STEPS = 16, 4  # samples of a batch, steps of an epoch
DENSE, HALF, QUARTER = 384, 192, 96  # FLOPs of a forward pass of one sample, with so many of the weights


def network(*, dropout: float = 0.0, hidden: int = 16) -> nn.Module:
    """Return 192 weights, for eight numbers and four classes."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, hidden, bias=False), nn.Tanh(), nn.Dropout(dropout), nn.Linear(hidden, 4, bias=False)]
    return nn.Sequential(*layers)


@dataclass
class Numbers:
    """Random batches, the same ones in every epoch; ``watch`` hears the number of each that is trained on."""

    count: int = STEPS
    seed: int = 0
    scales: dict[int, float] = field(default_factory=dict)  # number of a batch -> factor on its inputs
    watch: Callable[[int], None] = lambda number: None

    @property
    def samples(self) -> int:
        return self.count * BATCH

    def __len__(self) -> int:
        return self.count

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        inputs = torch.randn(BATCH, 8, generator=generator) * self.scales.get(number, 1.0)
        return inputs, torch.randint(4, (BATCH,), generator=generator)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(start, self.count):
            self.watch(epoch * self.count + number)
            yield self.batch(number)


def splits(train: Numbers | None = None) -> Splits:
    """Return data without a hold-out."""
    return Splits(
        train=train or Numbers(),  # type: ignore[arg-type]
        holdout=Numbers(count=0),  # type: ignore[arg-type]
        test=Numbers(count=2, seed=1),  # type: ignore[arg-type]
        example_input=torch.zeros(1, 8),
        classes=4,
        notice="random numbers",
    )


def make_run(folder: Path, method: Method, *, data: Numbers | None = None, model: Callable[[], nn.Module] = network,
             teacher: Callable[[], nn.Module] | None = None, teacher_name: str | None = None,
             learning_rate: LearningRateSettings | None = None, **train: Any) -> Run:  # fmt: skip
    """Return a run in a folder, a new one or one that was stopped."""
    run_folder = RunFolder(folder)
    if not run_folder.description.exists():
        run_folder.create({"config": {}})
    total = method.schedule.total_steps
    assert total % STEPS == 0
    settings = LoopSettings(
        optimizer=OptimizerSettings(lr=0.05, weight_decay=0.0),
        learning_rate=learning_rate or LearningRateSettings(),
        train=TrainSettings(epochs=total // STEPS, batch_size=BATCH, teacher=teacher_name, **train),
        steps_per_epoch=STEPS,
    )
    parts = RunParts(make_model=model, splits=splits(data), method=method, targets=Targets(), settings=settings,
                     seed=0, device=CPU, make_teacher=teacher)  # fmt: skip
    return Run(run_folder, parts)


def make_method(name: str, schedule: Schedule | None = None, **fields: Any) -> Method:
    """Return a method with equally sparse layers and a usual schedule of eight or more steps."""
    spreads = any(each.name == "distribution" for each in dataclasses.fields(METHODS[name]))
    uniform = {"distribution": Uniform()} if spreads else {}
    small = {"woodfisher": {"samples": 3, "block_size": 8}, "cram": {"sparsities": (0.5, 0.75)}}.get(name, {})
    made = usual_schedule(name) if schedule is None else schedule
    return METHODS[name](schedule=made, **{**uniform, **small, **fields})


def usual_schedule(name: str) -> Schedule:
    """Return the schedule below, which gives round costs, or what a recipe makes of the method's usual course."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    lengths = ScheduleSettings(
        sparsity=0.75, unit="fractions", warmup=0.25, sparse=0.125, dense=0.125, final_dense=0.25, final_sparse=0.25
    )
    return MethodSettings(name=name).build(lengths, steps_per_epoch=STEPS, epochs=2).schedule


_RISING = phases([(2, 0.0), (2, 0.5), (4, 0.75)])
_CONSTANT = phases([(8, 0.75)])
SCHEDULES: dict[str, Schedule] = {
    "acdc": alternating(sparsity=0.75, total_steps=16, warmup_steps=4, sparse_steps=4, dense_steps=2,
                        final_dense_steps=4, final_sparse_steps=4),
    "cram": phases([(6, 0.0), (2, 0.75)]),
    "dense": phases([(8, 0.0)]),
    "gmp": _RISING,
    "granet": _RISING,
    "imp": rounds(sparsity=0.75, count=2, round_steps=8, rewind_step=4),
    "oneshot": phases([(4, 0.0), (4, 0.75)]),
    "rigl": periodic(sparsity=0.75, total_steps=12, every_steps=4),
    "set": periodic(sparsity=0.75, total_steps=12, every_steps=4),
    "snip": _CONSTANT,
    "st3": _RISING,
    "static": _CONSTANT,
    "str": phases([(4, 0.75), (4, 0.75)]),
    "topkast": _CONSTANT,
    "woodfisher": _RISING,
}  # fmt: skip
