"""Where the time of a deployed network goes: its kernels in the network's order, by themselves, and from the cache.

    OMP_NUM_THREADS=1 python benchmarks/inference_profile.py --sparsities 0.9 0.95 --out profile.json

Each kernel is timed three ways, turn by turn on one thread, and the medians are added up:

- ``in order``: the whole network runs, kernel after kernel, as a call does.
- ``alone``: the same kernel has just run, so its weights, and activations that fit, are in the caches.
- ``band``: an eighth of the kernel's columns, at least one tile, has just been computed and is computed again, so that
  the activations it touches lie in the second-level cache at the latest. Kernels of a single tile count as ``alone``.
  Fusion with the layers around it, band by band, could make a kernel as fast as that, not faster: it saves no weights.

Beside them, in the same rounds, stands what the processor allows (inference_limits.py). Networks and masks are those of
inference.py.
"""

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from inference import Settings as NetworkSettings
from inference import machine, networks, pruned, write
from inference_limits import Limits, seconds
from torch import Tensor

from sparsetwin.kernels import Panels
from sparsetwin.kernels._team import KernelPiece
from sparsetwin.runtime import deploy
from sparsetwin.runtime._memory import Segment
from sparsetwin.runtime._program import Program
from sparsetwin.runtime._segments import PlaneKernel, kernel_pieces
from sparsetwin.runtime._steps import Product, Step

_BANDS = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    network: Literal["resnet50", "bert"] = "resnet50"
    sparsities: tuple[float, ...] = (0.9, 0.95)
    masks: Literal["acdc", "uniform"] = "acdc"
    rounds: int = 15
    seed: int = 0
    out: Path | None = None
    """Where the results go, as JSON."""


@dataclass
class Times:
    """Seconds of one step's kernels, round by round; and its multiply-adds, in operations."""

    kind: str
    operations: float
    in_order: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    band: list[float] = field(default_factory=list)


Work = list[tuple[Step, PlaneKernel, list[KernelPiece]]]


def bound(program: Program) -> tuple[Work, object]:
    """Return the kernels of a program for one image, in order, and the memory that they work on, as a call has it."""
    buffers = [layout.empty(1) for layout in program.memory.buffers]
    whole = {sheet: program.layouts[sheet].empty(1) for sheet in program.memory.whole}
    panels = Panels(program.panel_bytes)

    def planes(sheet: int) -> Tensor:
        return whole[sheet] if sheet in whole else buffers[program.memory.local[sheet]]

    steps = [step for part in program.parts if isinstance(part, Segment) for step in part.steps]
    found = [(step, program.kernels[step]) for step in steps if step in program.kernels]
    work = [(step, kernel, kernel_pieces(step, kernel, planes, None, (panels, 0))) for step, kernel in found]
    return work, (buffers, whole, panels)


def kind_and_operations(step: Step, kernel: PlaneKernel) -> tuple[str, float]:
    if not isinstance(step, Product):
        return "pooling, splitting", 0.0
    kept, geometry = kernel.matrix.kept, step.geometry
    height, width = geometry.out_size
    return "x".join(map(str, geometry.kernel)), 2.0 * kept * height * width


def band_of(piece: KernelPiece) -> tuple[KernelPiece, float] | None:
    """Return an eighth of a piece's tiles, in the middle, at least one, and its share; None where there is only one."""
    first, stop, row, stop_row = piece.ranges
    if stop - first < 2:
        return None
    some = max(1, (stop - first) // _BANDS)
    middle = (first + stop - some) // 2
    return KernelPiece(piece.kernel, piece.table, (middle, middle + some, row, stop_row)), some / (stop - first)


def profiled(program: Program, limits: Limits, rounds: int) -> list[Times]:
    work, memory = bound(program)
    assert memory  # it must outlive the kernels, which know its addresses only
    times = [Times(*kind_and_operations(step, kernel)) for step, kernel, _ in work]
    for number in range(-1, rounds):
        if number >= 0:
            limits.measure()
        for found, (_, _, pieces) in zip(times, work, strict=True):
            taken = sum(seconds(piece) for piece in pieces)
            if number >= 0:
                found.in_order.append(taken)
        for found, (_, _, pieces) in zip(times, work, strict=True):
            alone = cached = 0.0
            for piece in pieces:
                piece()
                here = seconds(piece)
                alone += here
                band = band_of(piece)
                if band is not None and found.operations:
                    part, share = band
                    part()
                    here = seconds(part) / share
                cached += here
            if number >= 0:
                found.alone.append(alone)
                found.band.append(cached)
    return times


def summed(times: list[Times]) -> dict[str, dict[str, float]]:
    """Return milliseconds by kind of kernel, and the speed of kept weights in order."""
    rows: dict[str, dict[str, float]] = {}
    for kind in [*dict.fromkeys(found.kind for found in times), "all"]:
        chosen = [found for found in times if kind in (found.kind, "all")]
        medians = {
            name: sum(statistics.median(getattr(found, name)) for found in chosen)
            for name in ("in_order", "alone", "band")
        }
        operations = sum(found.operations for found in chosen)
        rows[kind] = {f"{name}_ms": round(1e3 * spent, 3) for name, spent in medians.items()}
        rows[kind]["gigaflops_in_order"] = round(operations / medians["in_order"] / 1e9, 1)
        rows[kind]["gigaflops_band"] = round(operations / medians["band"] / 1e9, 1)
    return rows


@torch.no_grad()
def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    shown = NetworkSettings(network=settings.network, masks=settings.masks, seed=settings.seed)
    model, inputs, layers = networks(shown)
    given = {**asdict(settings), "out": None, "bands": _BANDS}
    report: dict[str, Any] = {"machine": machine(), "settings": given, "limits": {}, "results": {}}
    for sparsity in settings.sparsities:
        deployed = deploy(pruned(model, layers, sparsity, shown), inputs, threads=1, rivals=())
        (entry,) = deployed.plans_by_shape
        assert entry.program is not None, "no kernels run here"
        limits = Limits()
        rows = summed(profiled(entry.program.program, limits, settings.rounds))
        report["results"][f"{sparsity:.0%}"], report["limits"][f"{sparsity:.0%}"] = rows, limits.medians()
        for kind, row in rows.items():
            print(f"{sparsity:.0%} {kind:<20}", row, flush=True)
        print(f"{sparsity:.0%}", limits.medians(), flush=True)
    write(report, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
