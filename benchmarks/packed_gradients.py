"""What a step of DDP gains when only kept gradients are sent, on two processes of this machine.

    OMP_NUM_THREADS=1 python benchmarks/packed_gradients.py

A wide network and a small batch, so that sending gradients is most of a step. In each round plain DDP and packed DDP
take steps in turn, both in a sparse phase with equal masks; medians over the rounds are compared, of wall time and of
processor time (of all threads of this process, which other work on the machine disturbs less: on one machine sending
is processor time too). Bytes are counted. The time of each part is taken apart from the steps: an all-reduce of
the whole and of the packed size, packing and unpacking.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import tyro
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.integrations.ddp import PackedGradients, pack_gradients


@dataclass(frozen=True, kw_only=True)
class Settings:
    width: int = 2560
    layers: int = 3
    batch: int = 4
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    rounds: int = 9
    port: int = 29611


class Contestant:
    """A model under DDP in a sparse phase, packed or not."""

    def __init__(self, settings: Settings, sparsity: float, *, packed: bool) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(settings.width, settings.width) for _ in range(settings.layers)]
        self.model = DistributedDataParallel(nn.Sequential(*layers), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-4)
        schedule = st.schedules.constant(sparsity=sparsity, total_steps=10**9)
        sparsifier = st.Sparsifier(st.ACDC(schedule=schedule), self.model, optimizer)
        self.counts: PackedGradients | None = pack_gradients(self.model, sparsifier) if packed else None
        self.optimizer, self.sparsifier = optimizer, sparsifier

    def step(self, x: torch.Tensor) -> None:
        self.sparsifier.begin_step()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall and processor time in ms of a call that all processes begin together."""
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    processor = time.process_time() - processor
    dist.barrier()
    return 1e3 * (time.perf_counter() - wall), 1e3 * processor


def described(plain: list[float], packed: list[float]) -> str:
    """Return both medians, and the median and quartiles of the ratios of paired steps."""
    ratios = sorted(a / b for a, b in zip(plain, packed, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    medians = f"{statistics.median(plain):.0f} ms | {statistics.median(packed):.0f} ms"
    return f"{medians} | {statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})"


def compare(settings: Settings, sparsity: float, rank: int) -> None:
    plain, packed = (Contestant(settings, sparsity, packed=packed) for packed in (False, True))
    x = torch.randn(settings.batch, settings.width)
    for contestant in (plain, packed):  # DDP rearranges its buckets, masks are chosen
        contestant.step(x)
        contestant.step(x)
    assert packed.counts is not None
    packed.counts.bytes_sent = packed.counts.bytes_dense = 0
    times = [(timed(lambda: plain.step(x)), timed(lambda: packed.step(x))) for _ in range(settings.rounds)]
    same = all(map(torch.equal, plain.model.parameters(), packed.model.parameters()))
    wall, processor = (([a[i] for a, _ in times], [b[i] for _, b in times]) for i in (0, 1))
    sent, dense = (n / settings.rounds / 2**20 for n in (packed.counts.bytes_sent, packed.counts.bytes_dense))
    if rank == 0:
        print(
            f"| {sparsity:.0%} | {dense:.1f} MiB | {sent:.1f} MiB | {described(*wall)} | {described(*processor)} |"
            f"{'' if same else ' WEIGHTS DIFFER'}",
            flush=True,
        )


def parts(settings: Settings, sparsity: float, rank: int) -> None:
    """Print the time of each part of sending all gradients once, in buckets of 25 MiB as DDP has them."""
    size, total = 25 * 2**18, settings.layers * settings.width * (settings.width + 1)
    buckets, places = -(-total // size), (torch.rand(size) >= sparsity).nonzero().squeeze(1)
    buffer, message = torch.randn(size), torch.empty(places.numel())
    measured = {
        "all-reduce of all": lambda: dist.all_reduce(buffer),
        "all-reduce of kept": lambda: dist.all_reduce(message),
        "pack": lambda: torch.index_select(buffer, 0, places, out=message),
        "unpack": lambda: buffer.zero_().index_copy_(0, places, message),
    }
    told = []
    for name, function in measured.items():
        times = [timed(function) for _ in range(settings.rounds)]
        wall, processor = (buckets * statistics.median(column) for column in zip(*times, strict=True))
        told.append(f"{name} {wall:.0f} ms ({processor:.0f} ms of processor)")
    if rank == 0:
        print(f"parts at {sparsity:.0%}: {', '.join(told)}", flush=True)


def work(rank: int, settings: Settings) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{settings.port}", rank=rank, world_size=2)
    for sparsity in settings.sparsities:
        compare(settings, sparsity, rank)
    for sparsity in settings.sparsities:
        parts(settings, sparsity, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(work, (tyro.cli(Settings),), nprocs=2)
