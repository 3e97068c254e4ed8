"""Kernels one after the other on a team of threads: one native call a thread for all of them.

A hand-over through Python between two threads takes as long as a small kernel. Here the caller's thread begins alone,
the others join when they come, and between kernels they wait for each other in machine code.
"""

import ctypes
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._pool import Pool
from sparsetwin.kernels._target import host_target
from sparsetwin.kernels._team_ir import Step, Walk, WalkSpecification

_ATOMIC = ("x86_64", "amd64", "aarch64", "arm64")  # where counters of 64 bits are single instructions for sure


@dataclass(frozen=True, eq=False, slots=True)
class KernelPiece:
    """A part of a kernel's work on memory that stays where it is; calling it runs it."""

    kernel: Kernel
    table: "ctypes.Array[ctypes.c_int64]"
    ranges: tuple[int, int, int, int]

    def __call__(self) -> None:
        self.kernel.call(ctypes.addressof(self.table), *self.ranges)


class Chain:
    """Kernels that run one after the other, each cut into pieces that run in any order. Calls may run at once.

    Which threads come, and when, changes no result: the caller's alone would run every piece. A thread that waits for
    others looks at a counter, then offers its processor, then sleeps between looks.

    Args:
        kernels: The pieces of each kernel; none waits for a piece of its own kernel.
    """

    def __init__(self, kernels: Sequence[Sequence[KernelPiece]]) -> None:
        self._kernels = [tuple(pieces) for pieces in kernels if pieces]
        self._pieces = [piece for pieces in self._kernels for piece in pieces]
        self._walk = kernel(WalkSpecification(target=host_target())) if _has_atomics() else None
        self._steps = (ctypes.c_int64 * (Step.LENGTH * (len(self._pieces) + 1)))()
        place = 0
        for pieces in self._kernels:
            needed = place
            for piece in pieces:
                address = piece.kernel.code.address, ctypes.addressof(piece.table)
                self._row(place, (*address, *piece.ranges, needed))
                place += 1
        self._row(place, (0, 0, 0, 0, 0, 0, place))

    def run(self, pool: Pool | None = None) -> None:
        """Run all kernels once and return when they are done; without a pool, on the caller's thread alone."""
        walk = self._walk
        if walk is None:
            for pieces in self._kernels:
                (pool or Pool(1)).run(pieces)
            return
        table = self._table()
        address = ctypes.addressof(table)
        if pool is None or pool.threads == 1 or len(self._pieces) < 2:
            walk.call(address, 1, 0, 0, 0)
        else:
            pool.share(partial(self._join, table), here=partial(walk.call, address, 1, 0, 0, 0))

    def _join(self, table: "ctypes.Array[ctypes.c_int64]") -> None:
        """Take pieces of a call as long as there are some; holds on to all that the walk reads."""
        assert self._walk is not None
        self._walk.call(ctypes.addressof(table), 0, 0, 0, 0)

    def _table(self) -> "ctypes.Array[ctypes.c_int64]":
        table = (ctypes.c_int64 * Walk.LENGTH)()
        table[Walk.STEPS] = ctypes.addressof(self._steps)
        table[Walk.COUNT] = len(self._pieces)
        table[Walk.YIELD], table[Walk.SLEEP] = _waits()
        return table

    def _row(self, place: int, row: tuple[int, ...]) -> None:
        self._steps[Step.LENGTH * place : Step.LENGTH * (place + 1)] = list(row)


def _has_atomics() -> bool:
    return platform.machine().lower() in _ATOMIC


@cache
def _waits() -> tuple[int, int]:
    """Return the addresses of the functions that give the processor away, and that sleep; 0 where there is none."""
    if os.name != "posix":
        return 0, 0
    system = ctypes.CDLL(None)
    return _address(system, "sched_yield"), _address(system, "usleep")


def _address(library: ctypes.CDLL, name: str) -> int:
    function = getattr(library, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0
