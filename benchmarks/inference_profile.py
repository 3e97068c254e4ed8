"""Where the time of a deployed network goes: its kernels in the network's order, by themselves, and from the cache.

    OMP_NUM_THREADS=1 python benchmarks/inference_profile.py --sparsities 0.9 0.95 --out profile.json

Each kernel is timed three ways, turn by turn on one thread, and the medians are added up:

- ``in order``: the whole network runs, kernel after kernel, as a call does.
- ``alone``: the same kernel has just run, so its weights, and activations that fit, are in the caches.
- ``band``: an eighth of the kernel's columns, at least one tile, has just been computed and is computed again, so that
  the activations it touches lie in the second-level cache at the latest. Kernels of a single tile count as ``alone``.
  Fusion with the layers around it, band by band, could make a kernel as fast as that, not faster: it saves no weights.

Beside them, in the same rounds, stand the multiply-adds of the kernels' inner loop on this processor, in billions of
operations a second: operands in registers, each from the first-level cache where it begins with a cache line, and the
same one number off that, as the taps of a 3x3 convolution lie. Networks and masks are those of inference.py.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from inference import Settings as NetworkSettings
from inference import machine, networks, pruned, write
from torch import Tensor

from sparsetwin.kernels import Panels, host_target
from sparsetwin.kernels._emitter import FUNCTION, Emitter
from sparsetwin.kernels._llvm import compile_function
from sparsetwin.kernels._team import KernelPiece
from sparsetwin.runtime import deploy
from sparsetwin.runtime._memory import Segment
from sparsetwin.runtime._program import Program
from sparsetwin.runtime._segments import PlaneKernel, kernel_pieces
from sparsetwin.runtime._steps import Product, Step

_WEIGHTS = 4096  # of the inner loop by itself
_ROWS, _PITCH = 32, 13 * 64  # of its activations: 8 KiB are touched
_BANDS = 8
_VECTORS = 8  # of a tile, as the widest that kernels have
_SUMS = 10  # as many as hide the latency of multiply-adds


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


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def inner_loop(operands: Literal["registers", "memory"], vectors: int) -> Callable[[int], None]:
    """Return what runs the loop over one row's weights: a broadcast and so many multiply-adds for each.

    The returned function takes the byte offset of the activations from a cache line.
    """
    target = host_target()
    e = Emitter(arguments=4, lanes=target.lanes, fused=target.fused)
    activations, indices, values, out = (e.argument_pointer(place) for place in range(4))
    stop = e.function.args[1]
    held = e.load_vector(activations)
    with e.reducing_loop(e.int64(0), stop, [e.zeros()] * vectors, step=4) as (index, carried, following):
        following += carried
        for step in range(4):
            at = e.b.mul(e.b.add(index, e.int64(step)), e.int64(4))
            weight = e.broadcast(e.b.load(e.address(values, at), typ=e.f32, align=4))
            row = e.address(activations, e.b.sext(e.b.load(e.address(indices, at), typ=e.i32, align=4), e.i64))
            for vector in range(vectors):
                found = held
                if operands == "memory":
                    found = e.load_vector(e.address(row, e.int64(4 * target.lanes * vector)))
                following[vector] = e.multiply_add(
                    held if operands == "registers" else weight, found, following[vector]
                )
    for vector, total in enumerate(following):
        e.store_vector(total, e.address(out, e.int64(4 * target.lanes * vector)))
    e.b.ret_void()
    code = compile_function(e.text(), name=FUNCTION, features=target.feature_string)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_int64] * 4)(code.address)
    memory = torch.zeros(_ROWS * _PITCH + 4096, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    offsets = (torch.randint(_ROWS, (_WEIGHTS,), generator=generator) * _PITCH).int()
    ones, sums = torch.ones(_WEIGHTS), torch.empty(vectors * target.lanes)
    first = -memory.data_ptr() % 64 + memory.data_ptr()

    def run(offset: int) -> None:
        table = (ctypes.c_int64 * 4)(first + offset, offsets.data_ptr(), ones.data_ptr(), sums.data_ptr())
        call(ctypes.addressof(table), _WEIGHTS, 0, 0, 0)

    run.code = code, memory, offsets, ones, sums  # type: ignore[attr-defined]  # they outlive the addresses
    return run


class Limits:
    """The inner loop by itself, in billions of operations a second."""

    def __init__(self) -> None:
        registers, memory = inner_loop("registers", _SUMS), inner_loop("memory", _VECTORS)
        self._loops: dict[str, tuple[int, Callable[[], None]]] = {
            "registers": (_SUMS, lambda: registers(0)),
            "first-level cache": (_VECTORS, lambda: memory(0)),
            "first-level cache, across lines": (_VECTORS, lambda: memory(4)),
        }
        self.found: dict[str, list[float]] = {name: [] for name in self._loops}

    def measure(self, runs: int = 20) -> None:
        """Add a round: the best of some short runs of each loop."""
        for name, (sums, run) in self._loops.items():
            best = min(seconds(run) for _ in range(runs))
            self.found[name].append(2 * host_target().lanes * sums * _WEIGHTS / best / 1e9)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(found), 1) for name, found in self.found.items()}


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
    given = {**asdict(settings), "out": None, "vectors": _VECTORS, "sums in registers": _SUMS, "bands": _BANDS}
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
