"""The IR of a dense bfloat16 product on planes: activations are packed, tile of columns by tile, then met by weights.

Rows of taps are read from padded planes at byte offsets, as by the sparse kernels. Between blocks of a long sum
the partial sums wait in float32; bias, residual, activation and the mask of columns come at the store to planes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._dot import Dot
from sparsetwin.kernels._dot_ir import (
    SIDE,
    TILE_BYTES,
    AmxTiles,
    Block,
    EmulatedTiles,
    Operands,
    TileBlock,
    VectorBlock,
    paired,
)
from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import Activation, Element, check_activation
from sparsetwin.kernels._target import Target

DEPTH = 2 * SIDE  # of a tile: products that one dot product of tiles adds to a sum


@dataclass(frozen=True, kw_only=True)
class DenseSpecification:
    """A dense kernel: its instruction, and what it does at the store."""

    dot: Dot
    bias: bool = False
    residual: bool = False  # added before the activation
    activation: Activation | None = None
    element: Element = "float32"  # of the planes

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if self.element == "float16" and not self.target.half:
            raise ConfigError(f"{self.target.name} does not turn float16 into float32 in one instruction")

    @property
    def target(self) -> Target:
        """What is compiled for."""
        return self.dot.target


class DenseArgument(IntEnum):
    """The kernel's table of arguments: 64-bit integers and addresses. Pitches and distances are bytes."""

    INPUT = 0
    INPUT_GROUP = auto()  # from group to group
    OFFSETS = auto()  # int64, (depth,): where each row of taps begins
    DEPTH = auto()  # of a group's sums
    BLOCK_DEPTH = auto()  # of the sums over one panel, a multiple of 32
    WEIGHTS = auto()  # tiles: (groups, tile rows, tiles along the sums)
    WEIGHTS_GROUP = auto()
    WEIGHTS_ROW = auto()  # from tile row to tile row
    ROWS = auto()  # of a group
    FIRST_GROUP = auto()
    STOP_GROUP = auto()
    TILE_COLUMNS = auto()  # a multiple of 16
    PANEL = auto()
    PANEL_PITCH = auto()
    SUMS = auto()
    SUMS_PITCH = auto()
    SUMS_STEP = auto()  # from one block of rows to the next; 0 where sums do not wait for another block
    OUTPUT = auto()
    OUTPUT_PITCH = auto()
    BIAS = auto()  # float32, (groups * rows,)
    RESIDUAL = auto()
    RESIDUAL_PITCH = auto()
    KEEP = auto()  # integers of the planes' size, (columns,): all ones or zero


def block_shape(dot: Dot) -> tuple[int, int]:
    """Return how many rows and columns a block of sums has."""
    side = 2 * SIDE if dot.name == "amx" else SIDE
    return side, side


class _Dense:
    """The kernel under construction: ``void kernel(table, first column, stop column, first row, stop row)``.

    Columns are multiples of 16. Rows are those of each group; the first is a multiple of a block's.
    """

    def __init__(self, spec: DenseSpecification) -> None:
        self.spec = spec
        self.e = Emitter(arguments=4, lanes=SIDE, fused=spec.target.fused)
        self.half = spec.element == "float16"
        self.block = self._block()
        self.instruction = not spec.dot.emulated and "avx512bf16" in spec.target.features
        pointers = {"INPUT", "OFFSETS", "WEIGHTS", "PANEL", "SUMS", "OUTPUT", "BIAS", "RESIDUAL", "KEEP"}
        self.table = {
            one: (self.e.argument_pointer if one.name in pointers else self.e.argument_int)(one)
            for one in DenseArgument
        }

    def _block(self) -> Block:
        dot = self.spec.dot
        if dot.name == "avx512bf16":
            return VectorBlock(self.e, emulated=dot.emulated)
        return TileBlock(self.e, EmulatedTiles(self.e) if dot.emulated else AmxTiles(self.e))

    def text(self) -> str:
        """Write the loops and return the module."""
        e, table = self.e, self.table
        _, first_column, stop_column, first_row, stop_row = e.function.args
        width, depth = table[DenseArgument.TILE_COLUMNS], table[DenseArgument.DEPTH]
        tiles = self._parts(e.b.sub(stop_column, first_column), width)
        blocks = self._parts(depth, table[DenseArgument.BLOCK_DEPTH])
        self.block.begin()
        with (
            e.loop(table[DenseArgument.FIRST_GROUP], table[DenseArgument.STOP_GROUP]) as group,
            e.loop(e.int64(0), tiles) as tile,
        ):
            column = e.b.add(first_column, e.b.mul(tile, width))
            count = e.least(width, e.b.sub(stop_column, column))
            with e.loop(e.int64(0), blocks) as block:
                begin = e.b.mul(block, table[DenseArgument.BLOCK_DEPTH])
                end = e.least(e.b.add(begin, table[DenseArgument.BLOCK_DEPTH]), depth)
                along = self._parts(e.b.sub(end, begin), e.int64(DEPTH))
                self._pack(group, column, count, begin, end, along)
                fresh, last = e.b.icmp_signed("==", begin, e.int64(0)), e.b.icmp_signed("==", end, depth)
                with e.loop(first_row, stop_row, step=SIDE * self.block.rows) as row:
                    passed = e.b.sdiv(e.b.sub(row, first_row), e.int64(SIDE * self.block.rows))
                    sums = e.address(table[DenseArgument.SUMS], e.b.mul(passed, table[DenseArgument.SUMS_STEP]))
                    self._sum(group, row, count, begin, along, sums, fresh)
                    stop = e.least(e.b.add(row, e.int64(SIDE * self.block.rows)), stop_row)
                    e.either(
                        last,
                        lambda: self._finish(group, row, stop, column, count, sums),
                        lambda: [],
                    )
        self.block.end()
        e.b.ret_void()
        return e.text()

    def _parts(self, length: Any, part: Any) -> Any:
        return self.e.b.sdiv(self.e.b.add(length, self.e.b.sub(part, self.e.int64(1))), part)

    def _pack(self, group: Any, column: Any, count: Any, begin: Any, end: Any, along: Any) -> None:
        """Fill the panel: pairs of rows, one row without its pair, and zeros up to whole tiles."""
        e, table = self.e, self.table
        offsets = e.address(table[DenseArgument.OFFSETS], e.b.mul(begin, e.int64(8)))
        source = e.address(table[DenseArgument.INPUT], e.b.mul(group, table[DenseArgument.INPUT_GROUP]))
        source = e.address(source, self._in_planes(e.b.mul(column, e.int64(4))))
        rows = e.b.sub(end, begin)
        whole = e.b.ashr(rows, e.int64(1))
        started = e.b.ashr(e.b.add(rows, e.int64(1)), e.int64(1))

        def row(pair: Any, which: int) -> Any:
            entry = e.address(offsets, e.b.mul(e.b.add(e.b.mul(pair, e.int64(2)), e.int64(which)), e.int64(8)))
            return e.address(source, e.b.load(entry, typ=e.i64, align=8))

        for first, stop, present in ((e.int64(0), whole, 2), (whole, started, 1)):
            with e.loop(first, stop) as pair:
                read = [row(pair, which) for which in range(present)]
                with self._panel_row(pair, count) as (at, into):
                    loaded = [self._load(one, at) for one in read] + [e.splat(0.0)] * (2 - present)
                    e.b.store(paired(e, *loaded, instruction=self.instruction), into, align=4)
        with (
            e.loop(started, e.b.mul(along, e.int64(SIDE))) as pair,
            self._panel_row(pair, count) as (_, into),
        ):
            e.b.store(e.splat(0), into, align=4)

    @contextmanager
    def _panel_row(self, pair: Any, count: Any) -> Iterator[tuple[Any, Any]]:
        """Repeat the body for each vector of a row of the panel; it gets its offset in bytes, and its address."""
        e = self.e
        start = e.address(self.table[DenseArgument.PANEL], e.b.mul(pair, self.table[DenseArgument.PANEL_PITCH]))
        with e.loop(e.int64(0), count, step=SIDE) as column:
            at = e.b.mul(column, e.int64(4))
            yield at, e.address(start, at)

    def _sum(self, group: Any, row: Any, count: Any, begin: Any, along: Any, sums: Any, fresh: Any) -> None:
        """Emit the blocks of one row of blocks, with those that stick out of the matrix cut to what is there."""
        e, table, block = self.e, self.table, self.block
        tile_row = table[DenseArgument.WEIGHTS_ROW]
        weights = e.address(table[DenseArgument.WEIGHTS], e.b.mul(group, table[DenseArgument.WEIGHTS_GROUP]))
        weights = e.address(weights, e.b.mul(e.b.sdiv(row, e.int64(SIDE)), tile_row))
        weights = e.address(weights, e.b.mul(e.b.sdiv(begin, e.int64(DEPTH)), e.int64(TILE_BYTES)))
        whole = e.b.and_(count, e.int64(-SIDE * block.columns))

        def emit(rows: int, columns: int, first: Any, stop: Any) -> None:
            with e.loop(first, stop, step=SIDE * columns) as column:
                at = e.b.mul(column, e.int64(4))
                operands = Operands(
                    weights=weights,
                    tile_row=tile_row,
                    panel=e.address(table[DenseArgument.PANEL], at),
                    panel_pitch=table[DenseArgument.PANEL_PITCH],
                    tiles=along,
                    sums=e.address(sums, at),
                    sums_pitch=table[DenseArgument.SUMS_PITCH],
                    fresh=fresh,
                )
                block.emit(rows, columns, operands)

        def of_height(rows: int) -> list[Any]:
            emit(rows, block.columns, e.int64(0), whole)
            if block.columns > 1:
                emit(rows, 1, whole, count)
            return []

        if block.rows == 1:
            of_height(1)
            return
        both = e.b.icmp_signed("<", e.b.add(row, e.int64(SIDE)), table[DenseArgument.ROWS])
        e.either(both, lambda: of_height(2), lambda: of_height(1))

    def _finish(self, group: Any, first: Any, stop: Any, column: Any, count: Any, sums: Any) -> list[Any]:
        """Do what comes at the store: bias, residual, activation, mask of columns."""
        e, table, spec = self.e, self.table, self.spec
        start = e.b.mul(group, table[DenseArgument.ROWS])
        with e.loop(first, stop) as row:
            number = e.b.add(start, row)
            waiting = e.address(sums, e.b.mul(e.b.sub(row, first), table[DenseArgument.SUMS_PITCH]))
            shift = e.b.mul(column, e.int64(4))
            output = self._row(DenseArgument.OUTPUT, number, shift)
            residual = self._row(DenseArgument.RESIDUAL, number, shift) if spec.residual else None
            keep = e.address(table[DenseArgument.KEEP], self._in_planes(shift))
            bias = None
            if spec.bias:
                entry = e.address(table[DenseArgument.BIAS], e.b.mul(number, e.int64(4)))
                bias = e.broadcast(e.b.load(entry, typ=e.f32, align=4))
            with e.loop(e.int64(0), count, step=SIDE) as place:
                at = e.b.mul(place, e.int64(4))
                y = e.load_vector(e.address(waiting, at))
                y = y if bias is None else e.b.fadd(y, bias)
                y = y if residual is None else e.b.fadd(y, self._load(residual, at))
                self._store(self._activated(y), keep, output, at)
        return []

    def _activated(self, y: Any) -> Any:
        """Return what is stored. Of float16, ReLU hides no infinity below zero, which may have been made by it."""
        found = self.e.activate(y, self.spec.activation)
        return self.e.exposed(found, y) if self.half and self.spec.activation == "relu" else found

    def _in_planes(self, at: Any) -> Any:
        """Return where a column lies in planes, given where it lies among float32 numbers."""
        return self.e.b.ashr(at, self.e.int64(1)) if self.half else at

    def _load(self, row: Any, at: Any) -> Any:
        """Load a vector of a row of planes as float32."""
        e, place = self.e, self.e.address(row, self._in_planes(at))
        if not self.half:
            return e.load_vector(place)
        halves = e.ir.VectorType(e.ir.HalfType(), e.lanes)
        return e.b.fpext(e.b.load(place, typ=halves, align=2), e.vector)

    def _store(self, y: Any, keep: Any, output: Any, at: Any) -> None:
        """Store float32 numbers to planes, zero where a column is no pixel."""
        e, place = self.e, self._in_planes(at)
        integers, size = (e.ir.VectorType(e.i16, e.lanes), 2) if self.half else (e.integers, 4)
        y = e.b.fptrunc(y, e.ir.VectorType(e.ir.HalfType(), e.lanes)) if self.half else y
        y = e.keep_lanes(y, e.b.load(e.address(keep, place), typ=integers, align=size))
        e.b.store(y, e.address(output, place), align=size)

    def _row(self, base: DenseArgument, number: Any, shift: Any) -> Any:
        pitch = DenseArgument.OUTPUT_PITCH if base is DenseArgument.OUTPUT else DenseArgument.RESIDUAL_PITCH
        row = self.e.address(self.table[base], self.e.b.mul(number, self.table[pitch]))
        return self.e.address(row, self._in_planes(shift))


def dense_ir(spec: DenseSpecification) -> str:
    """Return the LLVM IR of a dense kernel."""
    return _Dense(spec).text()
