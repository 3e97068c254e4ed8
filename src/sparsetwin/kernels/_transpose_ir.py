"""The IR of the transposition kernel: squares of as many rows as a vector has lanes, whole cache lines written."""

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import ELEMENT_BYTES, LINE_BYTES, Element
from sparsetwin.kernels._target import Target


@dataclass(frozen=True, kw_only=True)
class TransposeSpecification:
    """A kernel that transposes a matrix, and turns its numbers into another format."""

    target: Target
    source: Element = "float32"
    destination: Element = "float32"

    def __post_init__(self) -> None:
        if (self.source, self.destination) != ("float32", "float32") and not self.target.half:
            raise ConfigError(f"{self.target.name} does not turn float16 into float32 in one instruction")


class TransposeArgument(IntEnum):
    """The kernel's table of arguments: 64-bit integers and addresses; pitches are bytes from row to row."""

    INPUT = 0
    INPUT_PITCH = auto()
    OUTPUT = auto()
    OUTPUT_PITCH = auto()
    COLUMNS = auto()  # of the input


class _Transpose:
    """The kernel under construction: ``void kernel(table, first row, stop row, unused, unused)``."""

    def __init__(self, spec: TransposeSpecification) -> None:
        self.e = Emitter(arguments=4, lanes=spec.target.lanes, fused=spec.target.fused)
        ir = self.e.ir
        kinds = {"float32": self.e.f32, "float16": ir.HalfType()}
        self.kinds = {  # of a number at each place
            TransposeArgument.INPUT: kinds[spec.source],
            TransposeArgument.OUTPUT: kinds[spec.destination],
        }
        self.sizes = {
            TransposeArgument.INPUT: ELEMENT_BYTES[spec.source],
            TransposeArgument.OUTPUT: ELEMENT_BYTES[spec.destination],
        }
        pointers = (TransposeArgument.INPUT, TransposeArgument.OUTPUT)
        self.arguments = {
            argument: (self.e.argument_pointer if argument in pointers else self.e.argument_int)(argument)
            for argument in TransposeArgument
        }

    def text(self) -> str:
        """Write the loops and return the module."""
        e = self.e
        _, first, stop, _, _ = e.function.args
        high = max(LINE_BYTES // self.sizes[TransposeArgument.OUTPUT], e.lanes)
        middle = e.b.add(first, e.b.and_(e.b.sub(stop, first), e.int64(-high)))
        columns = self.arguments[TransposeArgument.COLUMNS]
        whole = e.b.and_(columns, e.int64(-e.lanes))
        with e.loop(first, middle, step=high) as row, e.loop(e.int64(0), whole, step=e.lanes) as column:
            for part in range(0, high, e.lanes):
                self._square(e.b.add(row, e.int64(part)), column)
        with e.loop(first, middle) as row, e.loop(whole, columns) as column:
            self._one(row, column)
        with e.loop(middle, stop) as row, e.loop(e.int64(0), columns) as column:
            self._one(row, column)
        e.b.ret_void()
        return e.text()

    def _at(self, which: TransposeArgument, row: Any, column: Any) -> Any:
        e, pitch = self.e, TransposeArgument(which + 1)
        line = e.address(self.arguments[which], e.b.mul(row, self.arguments[pitch]))
        return e.address(line, e.b.mul(column, e.int64(self.sizes[which])))

    def _read(self, row: Any, column: Any, lanes: int) -> Any:
        """Load a vector, or with no lanes a number, as float32."""
        e, which = self.e, TransposeArgument.INPUT
        kind, wide = (self._vector(found, lanes) for found in (self.kinds[which], e.f32))
        found = e.b.load(self._at(which, row, column), typ=kind, align=self.sizes[which])
        return found if kind == wide else e.b.fpext(found, wide)

    def _write(self, found: Any, row: Any, column: Any, lanes: int) -> None:
        """Store a vector, or with no lanes a number, given as float32."""
        e, which = self.e, TransposeArgument.OUTPUT
        kind = self._vector(self.kinds[which], lanes)
        found = found if found.type == kind else e.b.fptrunc(found, kind)
        e.b.store(found, self._at(which, row, column), align=self.sizes[which])

    def _vector(self, kind: Any, lanes: int) -> Any:
        return self.e.ir.VectorType(kind, lanes) if lanes else kind

    def _square(self, row: Any, column: Any) -> None:
        """Transpose a square in registers: rows and lanes trade one bit of their numbers at a time."""
        e, lanes = self.e, self.e.lanes
        rows = [self._read(e.b.add(row, e.int64(number)), column, lanes) for number in range(lanes)]
        distance = 1
        while distance < lanes:
            low = [lane if not lane & distance else lanes + lane - distance for lane in range(lanes)]
            high = [lane + distance if not lane & distance else lanes + lane for lane in range(lanes)]
            for number in range(lanes):
                if not number & distance:
                    pair = rows[number], rows[number + distance]
                    rows[number] = e.b.shuffle_vector(*pair, e.ir.Constant(e.integers, low))
                    rows[number + distance] = e.b.shuffle_vector(*pair, e.ir.Constant(e.integers, high))
            distance *= 2
        for number, vector in enumerate(rows):
            place = e.b.add(column, e.int64(number))
            self._write(vector, place, row, lanes)

    def _one(self, row: Any, column: Any) -> None:
        self._write(self._read(row, column, 0), column, row, 0)


def transpose_ir(spec: TransposeSpecification) -> str:
    """Return the LLVM IR of a transposition kernel."""
    return _Transpose(spec).text()
