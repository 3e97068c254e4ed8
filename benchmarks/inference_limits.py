"""What this processor allows the sparse kernels, in billions of operations a second.

    OMP_NUM_THREADS=1 python benchmarks/inference_limits.py

- ``registers``: multiply-adds with operands in registers.
- ``first-level cache``: the kernels' inner loop, a weight and a row of activations at a time, without an end. Each
  operand begins with a cache line, or (``across lines``) a number behind that, as the taps of a 3x3 convolution do.
- ``rows of n``: whole kernels whose rows keep so many weights on average, as the rows of a block do in a layer.
  Activations fill half of the first-level cache, and one place takes all results, so that nothing else is slow. They go
  through many matrices: of a single one the processor learns where rows end.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch

from sparsetwin.kernels import CSRBlocks, SparseProduct, Tiling, host_target
from sparsetwin.kernels._emitter import FUNCTION, Emitter
from sparsetwin.kernels._launch import Addresses
from sparsetwin.kernels._llvm import compile_function

_VECTORS = 8  # of a tile, as the widest that kernels have by default
_SUMS = 10  # as many as hide the latency of multiply-adds
_WEIGHTS, _REPEATS = 1024, 64  # of the inner loop by itself
_ROWS, _PITCH = 32, 13 * 64  # of its activations: 8 KiB are touched
_KEPT = (8, 16, 32)  # weights of a row
_MATRICES, _MATRIX_ROWS, _MATRIX_COLUMNS = 24, 1024, 64
_RUNS = 5
Run = Callable[[], object]


def seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def inner_loop(operands: Literal["registers", "memory"], vectors: int) -> Callable[[int], None]:
    """Return what runs the loop over a row's weights again and again: for each a broadcast and some multiply-adds.

    The returned function takes the byte offset of the activations from a cache line.
    """
    target = host_target()
    e = Emitter(arguments=4, lanes=target.lanes, fused=target.fused)
    activations, indices, values, out = (e.argument_pointer(place) for place in range(4))
    _, stop, repeats, *_ = e.function.args
    held = e.load_vector(activations)
    with e.reducing_loop(e.int64(0), repeats, [e.zeros()] * vectors) as (_, sums, after):
        with e.reducing_loop(e.int64(0), stop, sums, step=4) as (index, carried, following):
            following += carried
            for step in range(4):
                at = e.b.mul(e.b.add(index, e.int64(step)), e.int64(4))
                weight = e.broadcast(e.b.load(e.address(values, at), typ=e.f32, align=4))
                row = e.address(activations, e.b.sext(e.b.load(e.address(indices, at), typ=e.i32, align=4), e.i64))
                for vector in range(vectors):
                    place = e.address(row, e.int64(4 * target.lanes * vector))
                    pair = (held, held) if operands == "registers" else (weight, e.load_vector(place))
                    following[vector] = e.multiply_add(*pair, following[vector])
        after += following
    for vector, total in enumerate(after):
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
        call(ctypes.addressof(table), _WEIGHTS, _REPEATS, 0, 0)

    run.keep_alive = code, memory, offsets, ones, sums  # type: ignore[attr-defined]  # the addresses are theirs
    return run


def short_rows(kept: int) -> tuple[float, Run]:
    """Return the operations of some products with so many weights a row on average, and what runs them."""
    columns = _VECTORS * host_target().lanes
    generator = torch.Generator().manual_seed(0)
    x, out = torch.zeros(_MATRIX_COLUMNS, columns + 16), torch.empty(columns)  # an odd number of lines from row to row
    products, pieces = [], []
    for _ in range(_MATRICES):
        weight = (torch.rand(_MATRIX_ROWS, _MATRIX_COLUMNS, generator=generator) < kept / _MATRIX_COLUMNS).float()
        product = SparseProduct(
            CSRBlocks.from_dense(weight), columns=columns, pitch=x.stride(0), tiling=Tiling(vectors=_VECTORS)
        )
        at = Addresses(input=x.data_ptr(), output=out.data_ptr(), output_pitch=0)
        pieces += product._product.pieces(at, threads=1)
        products.append(product)

    def run() -> None:
        for piece in pieces:
            piece()

    run.keep_alive = products, x, out  # type: ignore[attr-defined]
    return 2.0 * columns * sum(product.matrix.kept for product in products), run


class Limits:
    """Billions of operations a second, round by round."""

    def __init__(self) -> None:
        registers, memory = inner_loop("registers", _SUMS), inner_loop("memory", _VECTORS)
        each = 2.0 * host_target().lanes * _WEIGHTS * _REPEATS
        self._runs: dict[str, tuple[float, Run]] = {
            "registers": (each * _SUMS, lambda: registers(0)),
            "first-level cache": (each * _VECTORS, lambda: memory(0)),
            "across lines": (each * _VECTORS, lambda: memory(4)),
            **{f"rows of {kept}": short_rows(kept) for kept in _KEPT},
        }
        self.found: dict[str, list[float]] = {name: [] for name in self._runs}

    def measure(self) -> None:
        """Add a round: the best of some runs of each."""
        for name, (operations, run) in self._runs.items():
            self.found[name].append(operations / min(seconds(run) for _ in range(_RUNS)) / 1e9)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(found), 1) for name, found in self.found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    limits = Limits()
    for _ in range(15):
        limits.measure()
    print(limits.medians())
