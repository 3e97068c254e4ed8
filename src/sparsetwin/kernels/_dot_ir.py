"""The IR of a block of dense sums: dot products of bfloat16 pairs, on AMX's tiles or on vectors, real or emulated.

Weights lie in tiles of 16 rows by 16 pairs, 1024 bytes each. Activations lie in a panel: a row of 32-bit elements for
each pair of input rows, the first of a pair in the low half. An emulated block does the same in ordinary arithmetic and
in the same order, subnormal operands read as zero; all that surrounds a block is one and the same code.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import LINE_BYTES

SIDE = 16  # rows, pairs and columns of a tile
TILE_BYTES = SIDE * LINE_BYTES
_HIGH = -(1 << 16)  # the high half of 32 bits


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Where a block reads and writes: addresses, and distances in bytes."""

    weights: Any  # the first tile of the block's first tile row
    tile_row: Any  # from tile row to tile row
    panel: Any  # the block's first column
    panel_pitch: Any
    tiles: Any  # along the sums
    sums: Any  # float32, where the block's sums are left
    sums_pitch: Any
    fresh: Any  # i1: whether sums begin at zero, not at what was left


class Block(ABC):
    """Emits blocks of sums of at most ``rows`` x ``columns`` tiles."""

    rows: int
    columns: int
    layout: Literal["rows", "pairs"]  # what a line of a weight tile holds: 16 pairs of a row, or a pair of 16 rows

    @abstractmethod
    def begin(self) -> None:
        """Emit what a call starts with."""

    @abstractmethod
    def end(self) -> None:
        """Emit what a call ends with."""

    @abstractmethod
    def emit(self, rows: int, columns: int, at: Operands) -> None:
        """Emit a block of so many tiles."""


class TileBlock(Block):
    """Two by two tiles of sums, and two more for each side: all eight there are."""

    rows, columns, layout = 2, 2, "rows"

    def __init__(self, emitter: Emitter, tiles: "Tiles") -> None:
        self.e, self.tiles = emitter, tiles

    def begin(self) -> None:
        """Configure the tiles: other code in the process may use them otherwise."""
        self.tiles.configure()

    def end(self) -> None:
        """Leave the tiles as if they had not been used."""
        self.tiles.release()

    def emit(self, rows: int, columns: int, at: Operands) -> None:
        """Emit a loop along the sums: each weight tile is loaded once for all columns of the block, and vice versa."""
        e, tiles = self.e, self.tiles
        sums = [(row, column) for row in range(rows) for column in range(columns)]

        def place(row: int, column: int) -> Any:
            start = e.address(at.sums, e.b.mul(e.int64(SIDE * row), at.sums_pitch))
            return e.address(start, e.int64(LINE_BYTES * column))

        def zero() -> list[Any]:
            for row, column in sums:
                tiles.zero(2 * row + column)
            return []

        def again() -> list[Any]:
            for row, column in sums:
                tiles.load(2 * row + column, place(row, column), at.sums_pitch)
            return []

        e.either(at.fresh, zero, again)
        with e.loop(e.int64(0), at.tiles) as tile:
            weights = e.address(at.weights, e.b.mul(tile, e.int64(TILE_BYTES)))
            panel = e.address(at.panel, e.b.mul(e.b.mul(tile, e.int64(SIDE)), at.panel_pitch))
            for row in range(rows):
                start = e.address(weights, e.b.mul(e.int64(row), at.tile_row))
                tiles.load(4 + row, start, e.int64(LINE_BYTES))
                for column in range(columns):
                    if row == 0:
                        tiles.load(6 + column, e.address(panel, e.int64(LINE_BYTES * column)), at.panel_pitch)
                    tiles.dot(2 * row + column, 4 + row, 6 + column)
        for row, column in sums:
            tiles.store(2 * row + column, place(row, column), at.sums_pitch)


class VectorBlock(Block):
    """One tile of sums in 16 vector registers; each pair of weights is one broadcast operand from memory."""

    rows, columns, layout = 1, 1, "pairs"

    def __init__(self, emitter: Emitter, *, emulated: bool) -> None:
        self.e, self.emulated = emitter, emulated

    def begin(self) -> None:
        """Need nothing."""

    def end(self) -> None:
        """Leave nothing."""

    def emit(self, rows: int, columns: int, at: Operands) -> None:
        """Emit a loop along the sums, a pair a round."""
        e = self.e
        places = [e.address(at.sums, e.b.mul(e.int64(row), at.sums_pitch)) for row in range(SIDE)]
        sums = e.either(at.fresh, lambda: [e.splat(0.0)] * SIDE, lambda: [e.load_vector(pointer) for pointer in places])
        pairs = e.b.mul(at.tiles, e.int64(SIDE))
        with e.reducing_loop(e.int64(0), pairs, sums) as (pair, carried, following):
            weights = e.address(at.weights, e.b.mul(pair, e.int64(LINE_BYTES)))
            inputs = e.address(at.panel, e.b.mul(pair, at.panel_pitch))
            loaded = e.b.load(inputs, typ=e.integers, align=4)
            for row, sum_ in enumerate(carried):
                weight = e.b.load(e.address(weights, e.int64(4 * row)), typ=e.i32, align=4)
                following.append(self._dot(sum_, loaded, e.broadcast(weight)))
        for pointer, sum_ in zip(places, following, strict=True):
            e.store_vector(sum_, pointer)

    def _dot(self, sums: Any, inputs: Any, weights: Any) -> Any:
        e = self.e
        if self.emulated:
            (low, high), (low_weight, high_weight) = halves(e, inputs), halves(e, weights)
            return e.multiply_add(low, low_weight, e.multiply_add(high, high_weight, sums))
        pairs = e.ir.VectorType(bfloat(e), 2 * SIDE)
        dot = e.declare("llvm.x86.avx512bf16.dpbf16ps.512", e.vector, [e.vector, pairs, pairs])
        return e.b.call(dot, [sums, e.b.bitcast(inputs, pairs), e.b.bitcast(weights, pairs)])


class Tiles(ABC):
    """The operations on eight tiles of 16 lines of 64 bytes."""

    @abstractmethod
    def configure(self) -> None:
        """Make all tiles ready, of full size."""

    @abstractmethod
    def release(self) -> None:
        """Give them back."""

    @abstractmethod
    def zero(self, tile: int) -> None:
        """Clear a tile."""

    @abstractmethod
    def load(self, tile: int, pointer: Any, pitch: Any) -> None:
        """Load a tile's lines from memory, a pitch in bytes apart."""

    @abstractmethod
    def store(self, tile: int, pointer: Any, pitch: Any) -> None:
        """Store a tile's lines."""

    @abstractmethod
    def dot(self, sums: int, weights: int, inputs: int) -> None:
        """Add to each float32 sum the products of its row of weight pairs and its column of input pairs."""


class AmxTiles(Tiles):
    """The processor's own tiles, by number."""

    def __init__(self, emitter: Emitter) -> None:
        self.e = emitter

    def configure(self) -> None:
        """Load the configuration: palette 1, eight tiles of 16 rows and 64 bytes a row."""
        e = self.e
        memory = e.reserved(LINE_BYTES)
        widths, heights = 0x0040_0040_0040_0040, 0x1010_1010_1010_1010
        for place, word in enumerate((1, 0, widths, widths, 0, 0, heights, 0)):
            e.b.store(e.int64(word), e.address(memory, e.int64(8 * place)), align=8)
        self._call("ldtilecfg", memory)

    def release(self) -> None:
        """Return the tiles to their initial state, which Linux need not save."""
        self._call("tilerelease")

    def zero(self, tile: int) -> None:
        """Clear a tile."""
        self._call("tilezero", self.e.i8(tile))

    def load(self, tile: int, pointer: Any, pitch: Any) -> None:
        """Load a tile."""
        self._call("tileloadd64", self.e.i8(tile), pointer, pitch)

    def store(self, tile: int, pointer: Any, pitch: Any) -> None:
        """Store a tile."""
        self._call("tilestored64", self.e.i8(tile), pointer, pitch)

    def dot(self, sums: int, weights: int, inputs: int) -> None:
        """Multiply and add."""
        self._call("tdpbf16ps", *(self.e.i8(tile) for tile in (sums, weights, inputs)))

    def _call(self, name: str, *arguments: Any) -> None:
        kinds = [argument.type for argument in arguments]
        self.e.b.call(self.e.declare(f"llvm.x86.{name}", self.e.ir.VoidType(), kinds), arguments)


class EmulatedTiles(Tiles):
    """Tiles in the stack frame, as Intel's manual defines the operations on them."""

    def __init__(self, emitter: Emitter) -> None:
        self.e = emitter
        self.memory: list[Any] = []

    def configure(self) -> None:
        """Reserve memory, full of NaN: what is read must have been written."""
        e = self.e
        self.memory = [e.reserved(TILE_BYTES) for _ in range(8)]
        for tile in range(8):
            self._fill(tile, e.splat(-1))

    def release(self) -> None:
        """Need nothing."""

    def zero(self, tile: int) -> None:
        """Clear a tile."""
        self._fill(tile, self.e.splat(0))

    def load(self, tile: int, pointer: Any, pitch: Any) -> None:
        """Load a tile."""
        e = self.e
        for line in range(SIDE):
            source = e.address(pointer, e.b.mul(e.int64(line), pitch))
            self._store(e.b.load(source, typ=e.integers, align=4), tile, e.int64(line))

    def store(self, tile: int, pointer: Any, pitch: Any) -> None:
        """Store a tile."""
        e = self.e
        for line in range(SIDE):
            e.b.store(self._load(tile, e.int64(line)), e.address(pointer, e.b.mul(e.int64(line), pitch)), align=4)

    def dot(self, sums: int, weights: int, inputs: int) -> None:
        """Sum the first products of the pairs, and the second ones, then add both to what is there."""
        e = self.e
        with e.loop(e.int64(0), e.int64(SIDE)) as line:
            row = e.address(self.memory[weights], e.b.mul(line, e.int64(LINE_BYTES)))
            with e.reducing_loop(e.int64(0), e.int64(SIDE), [e.splat(0.0)] * 2) as (pair, carried, following):
                entry = e.address(row, e.b.mul(pair, e.int64(4)))
                weight = halves(e, e.broadcast(e.b.load(entry, typ=e.i32, align=4)))
                loaded = halves(e, self._load(inputs, pair))
                following += [e.multiply_add(*item) for item in zip(weight, loaded, carried, strict=True)]
            before = e.b.bitcast(self._load(sums, line), e.vector)
            after = e.b.fadd(before, e.b.fadd(*following))
            self._store(e.b.bitcast(after, e.integers), sums, line)

    def _fill(self, tile: int, vector: Any) -> None:
        for line in range(SIDE):
            self._store(vector, tile, self.e.int64(line))

    def _load(self, tile: int, line: Any) -> Any:
        return self.e.b.load(self._line(tile, line), typ=self.e.integers, align=4)

    def _store(self, vector: Any, tile: int, line: Any) -> None:
        self.e.b.store(vector, self._line(tile, line), align=4)

    def _line(self, tile: int, line: Any) -> Any:
        return self.e.address(self.memory[tile], self.e.b.mul(line, self.e.int64(LINE_BYTES)))


def halves(e: Emitter, pairs: Any) -> tuple[Any, Any]:
    """Return the two bfloat16 numbers of each 32-bit element as float32, subnormal ones as zero."""

    def number(bits: Any) -> Any:
        exponent = e.b.and_(bits, e.splat(0x7F800000))
        normal = e.b.icmp_unsigned("!=", exponent, e.splat(0))
        return e.b.bitcast(e.b.select(normal, bits, e.splat(0)), e.vector)

    return number(e.b.shl(pairs, e.splat(16))), number(e.b.and_(pairs, e.splat(_HIGH)))


def paired(e: Emitter, first: Any, second: Any, *, instruction: bool) -> Any:
    """Return two float32 vectors as pairs of bfloat16 in 32-bit elements, rounded to nearest even; NaN stays NaN."""

    def rounded(x: Any) -> Any:
        bits = e.b.bitcast(x, e.integers)
        if instruction:
            few = e.b.bitcast(e.b.fptrunc(x, e.ir.VectorType(bfloat(e), e.lanes)), e.ir.VectorType(e.i16, e.lanes))
            return e.b.shl(e.b.zext(few, e.integers), e.splat(16))
        even = e.b.and_(e.b.lshr(bits, e.splat(16)), e.splat(1))
        near = e.b.add(bits, e.b.add(even, e.splat(0x7FFF)))
        return e.b.select(e.b.fcmp_unordered("uno", x, x), e.b.or_(bits, e.splat(0x400000)), near)

    low = e.b.lshr(rounded(first), e.splat(16))
    return e.b.or_(low, e.b.and_(rounded(second), e.splat(_HIGH)))


def bfloat(e: Emitter) -> Any:
    """Return LLVM's type bfloat, which llvmlite has no class for."""
    return _bfloat_class(e.ir.HalfType)()


@cache
def _bfloat_class(half: Any) -> Any:
    def name(self: Any) -> str:
        return "bfloat"

    found: Any = type("BFloatType", (half,), {"__str__": name, "_to_string": name})
    found._create_instance()
    return found
