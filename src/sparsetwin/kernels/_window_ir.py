"""The IR of the window kernel: the maximum of a window of each plane, one or two columns apart, any number of rows.

A window of one element is a copy that leaves out columns and rows: how planes are split into phases. Larger windows
pool activations that are not negative, whose order is that of their bits.
"""

from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import Element, lanes_of
from sparsetwin.kernels._target import Target


@dataclass(frozen=True, kw_only=True)
class WindowSpecification:
    """A kernel for windows of ``kernel`` rows and columns, ``step`` columns apart."""

    target: Target
    kernel: tuple[int, int]
    step: int
    masked: bool  # a row's last vector is only partly there
    spills: bool = False  # it is stored whole, zeros behind the row's end, before the next row is
    element: Element = "float32"  # of the planes; only moved and compared as integers

    def __post_init__(self) -> None:
        if self.step not in (1, 2) or min(self.kernel) < 1:
            raise ConfigError(f"windows of {self.kernel}, {self.step} columns apart; expected a step of 1 or 2")


class WindowArgument(IntEnum):
    """The kernel's table of arguments: 64-bit integers and addresses; distances are bytes."""

    INPUT = 0  # the first window's first element
    INPUT_PLANE = auto()
    INPUT_PITCH = auto()  # from row to row
    INPUT_STEP = auto()  # from window to window downwards
    OUTPUT = auto()
    OUTPUT_PLANE = auto()
    OUTPUT_PITCH = auto()
    ROWS = auto()  # of the output
    VECTORS = auto()  # whole vectors a row
    LAST_LANES = auto()  # columns in the vector behind them


class _Window:
    """The kernel under construction: ``void kernel(table, first channel, stop channel, unused, unused)``."""

    def __init__(self, spec: WindowSpecification) -> None:
        self.spec = spec
        lanes = lanes_of(spec.target, spec.element)
        self.e = Emitter(arguments=4, lanes=lanes, fused=spec.target.fused, element=spec.element)
        pointers = (WindowArgument.INPUT, WindowArgument.OUTPUT)
        self.arguments = {
            argument: (self.e.argument_pointer if argument in pointers else self.e.argument_int)(argument)
            for argument in WindowArgument
        }
        self.vector_bytes = self.e.element_bytes * lanes

    def text(self) -> str:
        """Write the loops and return the module."""
        e, table = self.e, self.arguments
        _, first_channel, stop_channel, _, _ = e.function.args
        mask = e.first_lanes(table[WindowArgument.LAST_LANES]) if self.spec.masked else None
        with e.loop(first_channel, stop_channel) as channel:
            source = e.address(table[WindowArgument.INPUT], e.b.mul(channel, table[WindowArgument.INPUT_PLANE]))
            target = e.address(table[WindowArgument.OUTPUT], e.b.mul(channel, table[WindowArgument.OUTPUT_PLANE]))
            with e.loop(e.int64(0), table[WindowArgument.ROWS]) as row:
                above = e.address(source, e.b.mul(row, table[WindowArgument.INPUT_STEP]))
                out = e.address(target, e.b.mul(row, table[WindowArgument.OUTPUT_PITCH]))
                with e.loop(e.int64(0), table[WindowArgument.VECTORS]) as vector:
                    self._vector(above, out, vector, None)
                if mask is not None:
                    self._vector(above, out, table[WindowArgument.VECTORS], mask)
        e.b.ret_void()
        return e.text()

    def _vector(self, above: Any, out: Any, vector: Any, mask: Any) -> None:
        e, spec = self.e, self.spec
        at = e.b.mul(vector, e.int64(self.vector_bytes))
        source = e.address(above, e.b.mul(at, e.int64(spec.step)))
        best = None
        for row in range(spec.kernel[0]):
            line = e.address(source, e.b.mul(self.arguments[WindowArgument.INPUT_PITCH], e.int64(row)))
            for column in range(spec.kernel[1]):
                found = e.b.bitcast(self._load(line, column), e.element_integers)
                if spec.kernel != (1, 1):  # -0.0 and a NaN with its sign set are no smaller than others
                    found = e.b.and_(found, self._integers((1 << 8 * e.element_bytes - 1) - 1))
                best = found if best is None else e.b.select(e.b.icmp_signed(">", found, best), found, best)
        if mask is not None and spec.spills:
            best, mask = e.b.select(mask, best, self._integers(0)), None
        e.store_vector(e.b.bitcast(best, e.elements), e.address(out, at), mask)

    def _integers(self, number: int) -> Any:
        return self.e.ir.Constant(self.e.element_integers, [number] * self.e.lanes)

    def _load(self, line: Any, column: int) -> Any:
        e = self.e
        first = e.load_vector(e.address(line, e.int64(e.element_bytes * column)))
        if self.spec.step == 1:
            return first
        second = e.load_vector(e.address(line, e.int64(e.element_bytes * column + self.vector_bytes)))
        even = e.ir.Constant(e.integers, list(range(0, 2 * e.lanes, 2)))
        return e.b.shuffle_vector(first, second, even)


def window_ir(spec: WindowSpecification) -> str:
    """Return the LLVM IR of a window kernel."""
    return _Window(spec).text()
