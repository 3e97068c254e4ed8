"""The IR of the bitmask kernel for a few tokens: lanes over the columns of one row, weights unpacked by their mask.

A row's mask has one bit a column; its kept values lie packed. An expanding load puts each value into its lane, in one
instruction where the target has it (elsewhere LLVM writes branches, right but slow, so that only the tests do it).
Activations are loaded under the same mask: what lies at a pruned weight is never read, be it NaN or out of bounds.
"""

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import VALUE_BYTES, TokenSpecification


@dataclass(frozen=True, kw_only=True)
class BitmaskSpecification(TokenSpecification):
    """A kernel for ``tokens`` rows of activations against every row of a bitmask matrix; 8 or 16 lanes, a word."""

    tokens: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes not in (8, 16):
            raise ConfigError(f"a mask word has 8 or 16 bits, got lanes={self.lanes}")
        if not 1 <= self.tokens <= 8:
            raise ConfigError(f"bitmask kernels take 1 to 8 tokens, got {self.tokens}")


class BitmaskArgument(IntEnum):
    """The kernel's table of arguments. Pitches are bytes from token to token."""

    GROUPS = 0  # mask words a row
    ROW_POINTERS = auto()  # int32, (rows + 1,): each row's first value
    MASKS = auto()  # (rows, groups) words of ``lanes`` bits, the lowest bit first
    VALUES = auto()
    INPUT = auto()  # float32, (tokens, columns)
    INPUT_PITCH = auto()
    OUTPUT = auto()  # float32, (tokens, rows)
    OUTPUT_PITCH = auto()
    BIAS = auto()
    SCALES = auto()  # float32, (rows,)


class _Bitmask:
    """The kernel under construction: ``void kernel(table, unused, unused, first row, stop row)``."""

    def __init__(self, spec: BitmaskSpecification) -> None:
        self.spec = spec
        self.e = Emitter(arguments=4, lanes=spec.lanes, fused=spec.target.fused, half=spec.target.half)
        integers = {BitmaskArgument.GROUPS, BitmaskArgument.INPUT_PITCH, BitmaskArgument.OUTPUT_PITCH}
        self.arguments = {
            argument: (self.e.argument_int if argument in integers else self.e.argument_pointer)(argument)
            for argument in BitmaskArgument
        }

    def text(self) -> str:
        """Write the loops and return the module."""
        e, table, spec = self.e, self.arguments, self.spec
        word = e.ir.IntType(spec.lanes)
        word_bytes = spec.lanes // 8
        *_, first_row, stop_row = e.function.args
        with e.loop(first_row, stop_row) as row:
            row_masks = e.b.mul(e.b.mul(row, table[BitmaskArgument.GROUPS]), e.int64(word_bytes))
            masks = e.address(table[BitmaskArgument.MASKS], row_masks)
            start = e.address(table[BitmaskArgument.ROW_POINTERS], e.b.mul(row, e.int64(4)))
            packed = e.b.sext(e.b.load(start, typ=e.i32, align=4), e.i64)
            sums = [e.splat(0.0)] * spec.tokens
            with e.reducing_loop(e.int64(0), table[BitmaskArgument.GROUPS], [packed, *sums]) as (
                group,
                (position, *carried),
                following,
            ):
                entry = e.address(masks, e.b.mul(group, e.int64(word_bytes)))
                bits = e.b.load(entry, typ=word, align=word_bytes)
                mask = e.b.bitcast(bits, e.bits)
                weights = self._expand(position, mask)
                following.append(e.b.add(position, e.b.zext(self._count(bits, word), e.i64)))
                following += [
                    e.multiply_add(weights, self._activations(token, group, mask), carried[token])
                    for token in range(spec.tokens)
                ]
            for token, vector in enumerate(following[1:]):
                self._store(vector, token, row)
        e.b.ret_void()
        return e.text()

    def _expand(self, position: Any, mask: Any) -> Any:
        e = self.e
        value = self.spec.value
        element, size = e.stored_type(value), VALUE_BYTES[value]
        name = {4: "f32", 2: "i16", 1: "i8"}[size]
        kind = e.ir.VectorType(element, e.lanes)
        load = e.declare(f"llvm.masked.expandload.v{e.lanes}{name}", kind, [e.pointer, e.bits, kind])
        source = e.address(self.arguments[BitmaskArgument.VALUES], e.b.mul(position, e.int64(size)))
        values = e.b.call(load, [source, mask, e.ir.Constant(kind, None)])
        return e.widen(values, value)

    def _activations(self, token: int, group: Any, mask: Any) -> Any:
        e, table = self.e, self.arguments
        row = e.address(table[BitmaskArgument.INPUT], e.b.mul(table[BitmaskArgument.INPUT_PITCH], e.int64(token)))
        return e.load_vector(e.address(row, e.b.mul(group, e.int64(4 * e.lanes))), mask)

    def _count(self, bits: Any, word: Any) -> Any:
        return self.e.b.call(self.e.declare(f"llvm.ctpop.i{self.spec.lanes}", word, [word]), [bits])

    def _store(self, vector: Any, token: int, row: Any) -> None:
        """Add the lanes, then scale, bias and activation, and store one number."""
        e, table = self.e, self.arguments
        column = e.b.mul(row, e.int64(4))
        total = e.epilogue(
            e.sum_of_lanes(vector),
            scale=e.address(table[BitmaskArgument.SCALES], column) if self.spec.scaled else None,
            bias=e.address(table[BitmaskArgument.BIAS], column) if self.spec.bias else None,
            activation=self.spec.activation,
        )
        result = e.b.extract_element(total, e.i32(0))
        line = e.address(table[BitmaskArgument.OUTPUT], e.b.mul(table[BitmaskArgument.OUTPUT_PITCH], e.int64(token)))
        e.b.store(result, e.address(line, column), align=4)


def bitmask_ir(spec: BitmaskSpecification) -> str:
    """Return the LLVM IR of a bitmask kernel."""
    return _Bitmask(spec).text()
