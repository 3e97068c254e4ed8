"""How far masks drift apart when the same samples are added up differently: two processes against one.

    OMP_NUM_THREADS=1 python benchmarks/mask_overlap.py

A small residual network learns the digits with AC/DC from equal initial weights, on equal batches in equal order:

- ``order``: one process, the samples of each batch the other way round, so that sums round differently and no more;
- ``halves``: two processes with half of each batch each, under DistributedDataParallel;
- ``shuffle``: one process, other batches: what an unrelated change does, for scale.

Printed is the overlap of the masks with those of one process on the whole batch (weights kept by both / kept by either)
at each entry of a sparse phase. With ``group`` normalisation halves and order differ by rounding alone; with ``batch``
normalisation the statistics of half a batch are others than those of the whole.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.data import Digits

Kind = Literal["whole", "order", "halves", "shuffle"]
Norm = Literal["group", "batch"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    epochs: int = 20
    batch: int = 64
    width: int = 16
    sparsity: float = 0.9
    seeds: tuple[int, ...] = (0, 1, 2)
    norms: tuple[Norm, ...] = ("group", "batch")


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([normalisation(norm, outputs) for _ in range(2)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(hidden)) + self.shortcut(x)).relu()


def normalisation(norm: Norm, channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels) if norm == "group" else nn.BatchNorm2d(channels)


def network(norm: Norm, width: int) -> nn.Sequential:
    """Return a ResNet-8: one convolution, three blocks, one linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), normalisation(norm, width), nn.ReLU(),
        Block(width, width, 1, norm), Block(width, 2 * width, 2, norm), Block(2 * width, 4 * width, 2, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def schedule(settings: Settings, epoch_steps: int) -> st.Schedule:
    return st.schedules.alternating(
        sparsity=settings.sparsity, total_steps=settings.epochs * epoch_steps, warmup_steps=2 * epoch_steps,
        sparse_steps=3 * epoch_steps, dense_steps=3 * epoch_steps, final_dense_steps=3 * epoch_steps,
        final_sparse_steps=6 * epoch_steps,
    )  # fmt: skip


def train(settings: Settings, norm: Norm, seed: int, kind: Kind, rank: int) -> list[dict[str, Tensor]]:
    """Return the masks of each sparse phase."""
    torch.manual_seed(seed)
    model: nn.Module = network(norm, settings.width)
    if kind == "halves":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    order = seed + 1000 if kind == "shuffle" else seed
    data = Digits().load(None, batch_size=settings.batch, eval_batch_size=500, seed=order, device=torch.device("cpu"))
    sparsifier = st.Sparsifier(st.ACDC(schedule=schedule(settings, len(data.train))), model, optimizer)
    entered: list[dict[str, Tensor]] = []
    sparsifier.on_phase(lambda event, phase: entered.append(dict(sparsifier.masks)) if event == "enter" else None)
    for epoch in range(settings.epochs):
        for x, y in data.train.epoch(epoch):
            if kind == "order":
                x, y = x.flip(0), y.flip(0)
            if kind == "halves":
                x, y = x.chunk(2)[rank], y.chunk(2)[rank]
            sparsifier.begin_step()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [{name: mask.clone() for name, mask in masks.items()} for masks in entered if masks]


def work(rank: int, settings: Settings, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for norm in settings.norms:
        for seed in settings.seeds:
            kinds: tuple[Kind, ...] = ("whole", "halves") if rank == 0 else ("order", "shuffle", "halves")
            for kind in kinds:
                masks = train(settings, norm, seed, kind, rank)
                if rank == 0 or kind != "halves":
                    torch.save(masks, Path(folder) / f"{norm}-{seed}-{kind}.pt")
    dist.destroy_process_group()


def overlap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    either = sum(int((first[name] | second[name]).sum()) for name in first)
    return both / either


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (settings, folder), nprocs=2)
        for norm in settings.norms:
            for kind in ("order", "halves", "shuffle"):
                rows = []
                for seed in settings.seeds:
                    whole, other = (torch.load(Path(folder) / f"{norm}-{seed}-{k}.pt") for k in ("whole", kind))
                    rows.append([overlap(a, b) for a, b in zip(whole, other, strict=True)])
                phases = [f"{statistics.mean(p):.3f} ({min(p):.3f}-{max(p):.3f})" for p in zip(*rows, strict=True)]
                print(f"| {norm} | {kind} | {' | '.join(phases)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
