"""Vectors, loops and activation functions in LLVM IR: the words in which kernels are written."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sparsetwin.kernels._llvm import llvm_ir
from sparsetwin.kernels._specification import ELEMENT_BYTES, LINE_BYTES, Activation, Element, ValueFormat

FUNCTION = "kernel"
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of a float32


class Emitter:
    """Builds one function ``void kernel(...)`` on vectors of ``lanes`` numbers, float32 or as ``element`` says.

    Args:
        arguments: How many 64-bit arguments the function takes after the pointer to its table of arguments.
        lanes: Of one vector.
        fused: Whether multiply-adds round once; without the instruction they would be slow library calls.
        half: Whether float16 is widened by an instruction, for the same reason.
        element: Of vectors in memory.
    """

    def __init__(
        self, *, arguments: int, lanes: int, fused: bool, half: bool = False, element: Element = "float32"
    ) -> None:
        ir = llvm_ir()
        self.ir = ir
        self.lanes = lanes
        self.fused = fused
        self.half = half
        self.i1, self.i8, self.i16 = ir.IntType(1), ir.IntType(8), ir.IntType(16)
        self.i32, self.i64, self.f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        self.pointer = ir.PointerType()
        self.vector = ir.VectorType(self.f32, lanes)
        self.integers = ir.VectorType(self.i32, lanes)
        self.bits = ir.VectorType(self.i1, lanes)
        self.element_bytes = ELEMENT_BYTES[element]
        self.element = ir.HalfType() if element == "float16" else self.f32
        self.elements = ir.VectorType(self.element, lanes)
        self.element_integers = ir.VectorType(ir.IntType(8 * self.element_bytes), lanes)
        self.attributes: list[str] = []  # of the function, such as ``"name"="value"``
        self.module = ir.Module(name=FUNCTION)
        signature = ir.FunctionType(ir.VoidType(), [self.pointer] + [self.i64] * arguments)
        self.function = ir.Function(self.module, signature, name=FUNCTION)
        self.function.attributes.add("nounwind")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    def text(self) -> str:
        """Return the module. LLVM would split 512-bit vectors in two unless it is told that they are wanted."""
        bits = 8 * self.element_bytes * self.lanes
        wide = [f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'] if bits >= 512 else []
        return str(self.module).replace(" nounwind", " ".join([" nounwind", *wide, *self.attributes]), 1)

    # constants and addresses

    def int64(self, number: int) -> Any:
        """Return a 64-bit constant."""
        return self.ir.Constant(self.i64, number)

    def splat(self, number: float | int) -> Any:
        """Return a constant vector: of float32 for a float, of int32 for an int."""
        kind = self.vector if isinstance(number, float) else self.integers
        return self.ir.Constant(kind, [number] * self.lanes)

    def zeros(self) -> Any:
        """Return a vector of zeros of the element's type."""
        return self.ir.Constant(self.elements, [0.0] * self.lanes)

    def address(self, base: Any, byte_offset: Any) -> Any:
        """Return ``base`` moved by a number of bytes."""
        return self.b.gep(base, [byte_offset], source_etype=self.i8)

    def argument_pointer(self, index: int) -> Any:
        """Load an address from the table of arguments."""
        return self.b.inttoptr(self.argument_int(index), self.pointer)

    def argument_int(self, index: int) -> Any:
        """Load a 64-bit integer from the table of arguments."""
        table = self.function.args[0]
        return self.b.load(self.address(table, self.int64(8 * index)), typ=self.i64, align=8)

    # memory

    def load_vector(self, pointer: Any, mask: Any = None) -> Any:
        """Load a vector from any address; lanes that ``mask`` leaves out are not touched and read as zero."""
        size, kind = self.element_bytes, self.elements
        if mask is None:
            return self.b.load(pointer, typ=kind, align=size)
        name = f"llvm.masked.load.v{self.lanes}f{8 * size}.p0"
        load = self.declare(name, kind, [self.pointer, self.i32, self.bits, kind])
        return self.b.call(load, [pointer, self.i32(size), mask, self.zeros()])

    def store_vector(self, vector: Any, pointer: Any, mask: Any = None) -> None:
        """Store a vector to any address; lanes that ``mask`` leaves out are not touched."""
        size = self.element_bytes
        if mask is None:
            self.b.store(vector, pointer, align=size)
            return
        name = f"llvm.masked.store.v{self.lanes}f{8 * size}.p0"
        store = self.declare(name, self.ir.VoidType(), [self.elements, self.pointer, self.i32, self.bits])
        self.b.call(store, [vector, pointer, self.i32(size), mask])

    def prefetch(self, pointer: Any, byte_count: int, *, write: bool) -> None:
        """Ask for the cache lines of an address and of those behind it, which may lie anywhere: none is touched."""
        fetch = self.declare("llvm.prefetch.p0", self.ir.VoidType(), [self.pointer, self.i32, self.i32, self.i32])
        for start in range(0, byte_count, LINE_BYTES):
            self.b.call(
                fetch, [self.address(pointer, self.int64(start)), self.i32(int(write)), self.i32(3), self.i32(1)]
            )

    def broadcast(self, scalar: Any) -> Any:
        """Return a vector with ``scalar`` in every lane."""
        kind = self.ir.VectorType(scalar.type, self.lanes)
        one = self.b.insert_element(self.ir.Constant(kind, None), scalar, self.i32(0))
        return self.b.shuffle_vector(one, one, self.ir.Constant(self.integers, [0] * self.lanes))

    def first_lanes(self, count: Any) -> Any:
        """Return the mask that is true in the first ``count`` (int64) lanes."""
        lanes = self.ir.Constant(self.integers, list(range(self.lanes)))
        return self.b.icmp_unsigned("<", lanes, self.broadcast(self.b.trunc(count, self.i32)))

    def broadcast_lane(self, vector: Any, lane: int) -> Any:
        """Return a vector with one lane of another, which may be shorter, in every lane."""
        return self.b.shuffle_vector(vector, vector, self.ir.Constant(self.integers, [lane] * self.lanes))

    def stored_type(self, value: ValueFormat) -> Any:
        """Return the type as which a value is loaded."""
        return {"float32": self.f32, "int8": self.i8}.get(value, self.i16)

    def widen(self, stored: Any, value: ValueFormat) -> Any:
        """Turn stored values, a scalar or a vector of `stored_type`, into float32."""
        if value == "float32":
            return stored
        count = stored.type.count if isinstance(stored.type, self.ir.VectorType) else 0
        integer, real = (self.ir.VectorType(kind, count) if count else kind for kind in (self.i32, self.f32))

        def constant(kind: Any, number: float | int) -> Any:
            return self.ir.Constant(kind, [number] * count if count else number)

        if value == "int8":
            return self.b.sitofp(self.b.sext(stored, integer), real)
        if value == "float16" and self.half:
            half = self.ir.VectorType(self.ir.HalfType(), count) if count else self.ir.HalfType()
            return self.b.fpext(self.b.bitcast(stored, half), real)
        bits = self.b.zext(stored, integer)
        if value == "bfloat16":
            return self.b.bitcast(self.b.shl(bits, constant(integer, 16)), real)
        sign = self.b.shl(self.b.and_(bits, constant(integer, 0x8000)), constant(integer, 16))
        rest = self.b.shl(self.b.and_(bits, constant(integer, 0x7FFF)), constant(integer, 13))
        finite = self.b.fmul(self.b.bitcast(rest, real), constant(real, 2.0**112))  # exact, subnormals too
        special = self.b.or_(rest, constant(integer, 0x7F800000))  # infinity, or NaN with its payload
        is_special = self.b.icmp_unsigned(">=", rest, constant(integer, 0x7C00 << 13))
        chosen = self.b.select(is_special, special, self.b.bitcast(finite, integer))
        return self.b.bitcast(self.b.or_(chosen, sign), real)

    def widened(self, vector: Any) -> Any:
        """Return a vector of elements in float32."""
        return vector if vector.type == self.vector else self.b.fpext(vector, self.vector)

    def narrowed(self, vector: Any) -> Any:
        """Return a vector, float32 or of elements, as elements."""
        return vector if vector.type == self.elements else self.b.fptrunc(vector, self.elements)

    def reserved(self, byte_count: int) -> Any:
        """Return the address of memory in the stack frame, at a cache line; to be asked for in the first block."""
        memory = self.b.alloca(self.ir.ArrayType(self.i8, byte_count))
        memory.align, memory.type = LINE_BYTES, self.pointer  # llvmlite's own type names what it points to
        return memory

    # loops

    @contextmanager
    def loop(self, start: Any, stop: Any, *, step: int = 1) -> Iterator[Any]:
        """Repeat the body for an index from ``start`` while it is below ``stop``."""
        with self.reducing_loop(start, stop, [], step=step) as (index, _, _):
            yield index

    @contextmanager
    def reducing_loop(
        self, start: Any, stop: Any, values: Sequence[Any], *, step: int = 1
    ) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """Repeat the body; it gets the index, the values so far, and a list in which it leaves the next values.

        After the loop that same list holds the final values.
        """
        before = self.b.block
        head, body, done = (self.function.append_basic_block(name) for name in ("head", "body", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(self.i64)
        index.add_incoming(start, before)
        carried = [self.b.phi(value.type) for value in values]
        for phi, value in zip(carried, values, strict=True):
            phi.add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", index, stop), body, done)
        self.b.position_at_end(body)
        following: list[Any] = []
        yield index, list(carried), following
        index.add_incoming(self.b.add(index, self.int64(step)), self.b.block)
        for phi, value in zip(carried, following, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        following[:] = carried
        self.b.position_at_end(done)

    def least(self, a: Any, b: Any) -> Any:
        """Return the smaller of two 64-bit integers."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def either(self, condition: Any, yes: Callable[[], list[Any]], no: Callable[[], list[Any]]) -> list[Any]:
        """Run one of two branches, each of which returns as many values of the same types; return the values."""
        blocks = [self.function.append_basic_block(name) for name in ("yes", "no", "joined")]
        self.b.cbranch(condition, blocks[0], blocks[1])
        results, ends = [], []
        for branch, block in ((yes, blocks[0]), (no, blocks[1])):
            self.b.position_at_end(block)
            results.append(branch())
            ends.append(self.b.block)
            self.b.branch(blocks[2])
        self.b.position_at_end(blocks[2])
        joined = []
        for first, second in zip(*results, strict=True):
            phi = self.b.phi(first.type)
            phi.add_incoming(first, ends[0])
            phi.add_incoming(second, ends[1])
            joined.append(phi)
        return joined

    # arithmetic

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return ``a * b + c``, rounded once where the target can."""
        if not self.fused:
            return self.b.fadd(self.b.fmul(a, b), c)
        kind = a.type
        name = "fma.v{}f32" if kind == self.vector else "fmuladd.v{}f16"  # without the instruction: two, no call
        fma = self.declare(f"llvm.{name.format(self.lanes)}", kind, [kind] * 3)
        return self.b.call(fma, [a, b, c])

    def keep_lanes(self, vector: Any, bits: Any) -> Any:
        """Clear the lanes whose integer, of the element's size, in ``bits`` is zero; the others are all ones."""
        return self.b.bitcast(self.b.and_(self.b.bitcast(vector, bits.type), bits), vector.type)

    def sum_of_lanes(self, vector: Any) -> Any:
        """Return a vector whose first lane is the sum of all lanes, added in halves."""
        width = self.lanes
        while width > 1:
            width //= 2
            moved = [min(lane + width, self.lanes - 1) for lane in range(self.lanes)]
            order = self.ir.Constant(self.integers, moved)
            vector = self.b.fadd(vector, self.b.shuffle_vector(vector, vector, order))
        return vector

    def epilogue(self, total: Any, *, scale: Any, bias: Any, activation: Activation | None) -> Any:
        """Return a row's sum as it is stored; ``scale`` and ``bias`` are the addresses of its numbers, or None."""
        if scale is not None:
            total = self.b.fmul(total, self.broadcast(self.b.load(scale, typ=self.f32, align=4)))
        if bias is not None:
            total = self.b.fadd(total, self.broadcast(self.b.load(bias, typ=self.f32, align=4)))
        return self.activate(total, activation)

    def activate(self, x: Any, activation: Activation | None) -> Any:
        """Return the activation function of a vector. NaN stays NaN."""
        if activation is None:
            return x
        return {"relu": self._relu, "gelu": self._gelu, "gelu_tanh": self._gelu_tanh, "silu": self._silu}[activation](x)

    def _relu(self, x: Any) -> Any:
        zero = self.ir.Constant(x.type, [0.0] * self.lanes)
        return self._select(self.b.fcmp_ordered("<", x, zero), zero, x)

    def exposed(self, x: Any, original: Any) -> Any:
        """Return ``x``, NaN where ``original`` is not finite."""
        return self.b.fadd(x, self.b.fsub(original, original))

    def _silu(self, x: Any) -> Any:
        return self.b.fdiv(x, self.b.fadd(self.splat(1.0), self._exp(self.b.fneg(x))))

    def _gelu_tanh(self, x: Any) -> Any:
        """``x * sigmoid(2 z)`` is ``x / 2 * (1 + tanh z)``, with z = sqrt(2 / pi) * (x + 0.044715 x^3)."""
        cubic = self.multiply_add(self.b.fmul(x, x), self.splat(0.044715), self.splat(1.0))
        twice = self.b.fmul(self.b.fmul(x, cubic), self.splat(2 * 0.7978845608028654))
        return self.b.fdiv(x, self.b.fadd(self.splat(1.0), self._exp(self.b.fneg(twice))))

    def _gelu(self, x: Any) -> Any:
        """``x * Phi(x)``; the tail of Phi by formula 7.1.26 of Abramowitz & Stegun, absolute error below 1.5e-7."""
        z = self.b.fmul(self._absolute(x), self.splat(0.7071067811865476))
        t = self.b.fdiv(self.splat(1.0), self.multiply_add(z, self.splat(0.3275911), self.splat(1.0)))
        tail = self.splat(1.061405429)
        for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
            tail = self.multiply_add(tail, t, self.splat(coefficient))
        gauss = self._exp(self.b.fneg(self.b.fmul(z, z)))
        tail = self.b.fmul(self.b.fmul(self.b.fmul(tail, t), gauss), self.splat(0.5))
        below = self.b.fcmp_ordered("<", x, self.splat(0.0))
        return self.b.fmul(x, self._select(below, tail, self.b.fsub(self.splat(1.0), tail)))

    def _exp(self, x: Any) -> Any:
        """``2**n * exp(r)`` with n the nearest integer to x / ln 2 and a Taylor polynomial in r."""
        for bound, comparison in ((-87.0, "<"), (88.0, ">")):
            x = self._select(self.b.fcmp_ordered(comparison, x, self.splat(bound)), self.splat(bound), x)
        shifted = self.multiply_add(x, self.splat(1.4426950408889634), self.splat(_ROUND))
        n = self.b.fsub(shifted, self.splat(_ROUND))
        r = self.multiply_add(n, self.splat(-0.693359375), x)  # ln 2 in two parts: the first is exact times n
        r = self.multiply_add(n, self.splat(2.12194440e-4), r)
        result = self.splat(1.0 / 5040)
        for coefficient in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
            result = self.multiply_add(result, r, self.splat(coefficient))
        exponent = self.b.add(self.b.bitcast(shifted, self.integers), self.splat(127))
        return self.b.fmul(result, self.b.bitcast(self.b.shl(exponent, self.splat(23)), self.vector))

    def _absolute(self, x: Any) -> Any:
        return self.keep_lanes(x, self.splat(0x7FFFFFFF))

    def _select(self, condition: Any, yes: Any, no: Any) -> Any:
        return self.b.select(condition, yes, no)

    def declare(self, name: str, result: Any, arguments: list[Any]) -> Any:
        """Return the function of that name, declared at its first use."""
        if name in self.module.globals:
            return self.module.globals[name]
        return self.ir.Function(self.module, self.ir.FunctionType(result, arguments), name=name)
