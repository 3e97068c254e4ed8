"""The IR of the kernel for one token: lanes over the kept weights of a row, whose activations are picked one by one.

A vector of values is one load; its activations are as many loads, each put into its lane. That takes fewer
instructions than a multiply-add for every weight, and on the processors measured fewer cycles than a gather. What
remains of a row is done under a mask, so that the only branch that may be mispredicted is the one behind a row's whole
vectors. Values and columns behind a row are read there, and thrown away: they are the next row's, or padding.
"""

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import VALUE_BYTES, TokenSpecification


@dataclass(frozen=True, kw_only=True)
class OneTokenSpecification(TokenSpecification):
    """A kernel for one row of activations against every row of a matrix with 16-bit columns; 4 or 8 lanes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes not in (4, 8):
            raise ConfigError(f"a kernel for one token takes 4 or 8 weights at a time, got lanes={self.lanes}")


class OneTokenArgument(IntEnum):
    """The kernel's table of arguments."""

    ROW_POINTERS = 0  # int32, (rows + 1,): each row's first value
    COLUMNS = auto()  # uint16, one for each value; 8 more may be read
    VALUES = auto()  # 8 more may be read
    BIAS = auto()  # float32, (rows,)
    SCALES = auto()  # float32, (rows,)
    INPUT = auto()  # float32, (columns,)
    OUTPUT = auto()  # float32, (rows,)


class _OneToken:
    """The kernel under construction: ``void kernel(table, unused, unused, first row, stop row)``."""

    def __init__(self, spec: OneTokenSpecification) -> None:
        self.spec = spec
        self.e = Emitter(arguments=4, lanes=spec.lanes, fused=spec.target.fused, half=spec.target.half)
        self.arguments = {argument: self.e.argument_pointer(argument) for argument in OneTokenArgument}

    def text(self) -> str:
        """Write the loops and return the module."""
        e, lanes = self.e, self.spec.lanes
        *_, first_row, stop_row = e.function.args
        with e.loop(first_row, stop_row) as row:
            entry = e.address(self.arguments[OneTokenArgument.ROW_POINTERS], e.b.mul(row, e.int64(4)))
            begin, end = (
                e.b.sext(e.b.load(e.address(entry, e.int64(4 * which)), typ=e.i32, align=4), e.i64) for which in (0, 1)
            )
            whole_end = e.b.add(begin, e.b.and_(e.b.sub(end, begin), e.int64(-lanes)))
            with e.reducing_loop(begin, whole_end, [e.splat(0.0)], step=lanes) as (index, (total,), following):
                following.append(e.multiply_add(self._values(index), self._picked(index), total))
            rest = e.b.fmul(self._values(whole_end), self._picked(whole_end))
            rest = e.b.select(e.first_lanes(e.b.sub(end, whole_end)), rest, e.splat(0.0))
            self._store(e.sum_of_lanes(e.b.fadd(following[0], rest)), row)
        e.b.ret_void()
        return e.text()

    def _values(self, index: Any) -> Any:
        e, value = self.e, self.spec.value
        size = VALUE_BYTES[value]
        entry = e.address(self.arguments[OneTokenArgument.VALUES], e.b.mul(index, e.int64(size)))
        stored = e.b.load(entry, typ=e.ir.VectorType(e.stored_type(value), self.spec.lanes), align=size)
        return e.widen(stored, value)

    def _picked(self, index: Any) -> Any:
        """Return the activations of a vector of kept weights."""
        e = self.e
        columns = e.address(self.arguments[OneTokenArgument.COLUMNS], e.b.mul(index, e.int64(2)))
        found = e.ir.Constant(e.vector, None)
        for lane in range(self.spec.lanes):
            column = e.b.zext(e.b.load(e.address(columns, e.int64(2 * lane)), typ=e.i16, align=2), e.i64)
            entry = e.address(self.arguments[OneTokenArgument.INPUT], e.b.mul(column, e.int64(4)))
            found = e.b.insert_element(found, e.b.load(entry, typ=e.f32, align=4), e.i32(lane))
        return found

    def _store(self, total: Any, row: Any) -> None:
        e, place = self.e, self.e.b.mul(row, self.e.int64(4))
        total = e.epilogue(
            total,
            scale=e.address(self.arguments[OneTokenArgument.SCALES], place) if self.spec.scaled else None,
            bias=e.address(self.arguments[OneTokenArgument.BIAS], place) if self.spec.bias else None,
            activation=self.spec.activation,
        )
        output = e.address(self.arguments[OneTokenArgument.OUTPUT], place)
        e.b.store(e.b.extract_element(total, e.i32(0)), output, align=4)


def one_token_ir(spec: OneTokenSpecification) -> str:
    """Return the LLVM IR of a kernel for one token."""
    return _OneToken(spec).text()
