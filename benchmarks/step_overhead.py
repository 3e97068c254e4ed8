"""What a training step costs in a dense and in a sparse phase, as ratios to the plain step.

    python benchmarks/step_overhead.py --model resnet20 --batch 128 --size 32
    python benchmarks/step_overhead.py --model resnet50 --batch 8 --size 64
    python benchmarks/step_overhead.py --model resnet18 --batch 512 --size 32 --device cuda --steps 100

The three kinds of step alternate in one run, each on a model of its own with equal weights; medians are compared. The
operators of a dense-phase step are listed by the profiler and compared with those of the plain step.
"""

import copy
import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

import sparsetwin as st
from sparsetwin.models import build


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = "resnet20"
    batch: int = 128
    size: int = 32
    sparsity: float = 0.9
    steps: int = 15
    threads: int = 1
    device: str = "cpu"


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Contestant:
    """A model that takes the same step, plain or with a Sparsifier in a phase."""

    def __init__(self, model: torch.nn.Module, sparsity: float | None) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.sparsifier = None
        if sparsity is not None:
            schedule = st.schedules.constant(sparsity=sparsity, total_steps=10**9)
            method = st.ACDC(schedule=schedule)
            self.sparsifier = st.Sparsifier(method, self.model, self.optimizer)

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.sparsifier is not None:
            self.sparsifier.begin_step()
        F.cross_entropy(self.model(x), y).backward()

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.backward(x, y)
        self.optimizer.step()
        self.optimizer.zero_grad()


def operators(contestant: Contestant, x: torch.Tensor, y: torch.Tensor) -> Counter[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        contestant.step(x, y)
    return Counter({event.key: event.count for event in profiler.key_averages() if event.key.startswith("aten::")})


def main() -> None:
    settings = tyro.cli(Settings)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device = torch.device(settings.device)
    classes = {"num_classes": 10} if settings.model in ("resnet20", "resnet18") else {}
    model = build(settings.model, **classes).to(device)
    x = torch.randn(settings.batch, 3, settings.size, settings.size, device=device)
    y = torch.randint(0, 10, (settings.batch,), device=device)
    contestants = {
        "plain": Contestant(model, None),
        "dense phase": Contestant(model, 0.0),
        "sparse phase": Contestant(model, settings.sparsity),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(settings.steps + 2):
        for name, contestant in contestants.items():
            started = now(device)
            contestant.step(x, y)
            if round_number >= 2:
                seconds[name].append(now(device) - started)
    print(f"torch {torch.__version__}, {settings}")
    plain = seconds["plain"]
    for name, measured in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(measured, plain, strict=True)]
        print(
            f"{name:>13}: median {statistics.median(measured) * 1e3:8.1f} ms, "
            f"ratio of medians {statistics.median(measured) / statistics.median(plain):.3f}, "
            f"median of paired ratios {statistics.median(ratios):.3f}"
        )
    sparsifier = contestants["sparse phase"].sparsifier
    assert sparsifier is not None
    contestants["sparse phase"].backward(x, y)
    started = now(device)
    for _ in range(50):
        sparsifier.mask_gradients()
    spent = (now(device) - started) / 50
    share = 2 * spent / statistics.median(plain)
    print(f"masking gradients and weights: about {2e3 * spent:.2f} ms a step, {share:.2%} of the plain step")
    difference = operators(contestants["dense phase"], x, y)
    difference.subtract(operators(contestants["plain"], x, y))
    extra = {name: count for name, count in difference.items() if count}
    print(f"operators of a dense-phase step beyond the plain step: {extra or 'none'}")


if __name__ == "__main__":
    main()
