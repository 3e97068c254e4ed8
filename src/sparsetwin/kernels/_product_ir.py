"""The IR of the product kernel: a K-blocked sparse matrix times a tile of dense columns.

Lanes run over columns, so each kept weight is one broadcast and ``vectors`` multiply-adds with operands from memory.
All rows pass over one block of activation rows before the next block is touched, so that it stays in the cache;
between blocks the partial sums wait in the output. Rows that keep all columns are worked on several at a time: an
activation is then loaded once for all of them.

With float16 activations products are added in float16 too. Rows with few weights are so from bias to store. For others
such sums start at zero, end after a run of products or with the block, and are added in float32. These sums wait on the
stack, for as many rows at a time as have room there.
"""

from collections.abc import Callable
from enum import IntEnum, auto
from typing import Any

from sparsetwin.kernels._emitter import Emitter
from sparsetwin.kernels._specification import VALUE_BYTES, ProductSpecification

_UNROLL = 4  # weights a round of the inner loop
_AHEAD = 4  # rows ahead for which memory is asked: they lie a plane apart, which no processor foresees


class Argument(IntEnum):
    """The kernel's table of arguments: 64-bit integers and addresses. Pitches are bytes from row to row."""

    BLOCKS = 0
    ROWS = auto()
    ROW_POINTERS = auto()  # int32, (blocks, rows + 1)
    INDICES = auto()  # int32 byte offsets or uint16 columns
    VALUES = auto()
    INPUT = auto()
    OUTPUT = auto()
    OUTPUT_PITCH = auto()
    BIAS = auto()  # float32, (rows,)
    RESIDUAL = auto()
    RESIDUAL_PITCH = auto()
    KEEP = auto()  # integers of the elements' size, (columns,): all ones or zero
    FIRST_COLUMN = auto()  # where tile 0 begins
    LAST_LANES = auto()  # columns in the last vector of a masked tile
    SCALES = auto()  # float32, (rows,)


class _Product:
    """The kernel under construction: ``void kernel(table, first tile, stop tile, first row, stop row)``."""

    def __init__(self, spec: ProductSpecification) -> None:
        self.spec = spec
        target = spec.target
        self.e = Emitter(arguments=4, lanes=spec.lanes, fused=target.fused, half=target.half, element=spec.element)
        self.wide = spec.element == "float16" and spec.accumulator == "float32"
        self.arguments: dict[Argument, Any] = {}
        pointers = {Argument.ROW_POINTERS, Argument.INDICES, Argument.VALUES, Argument.INPUT, Argument.OUTPUT}
        pointers |= {Argument.BIAS, Argument.RESIDUAL, Argument.KEEP, Argument.SCALES}
        for argument in Argument:
            load = self.e.argument_pointer if argument in pointers else self.e.argument_int
            self.arguments[argument] = load(argument)
        self.vector_bytes = self.e.element_bytes * spec.lanes
        self.mask = self.e.first_lanes(self.arguments[Argument.LAST_LANES]) if spec.masked else None
        self.waiting = self._stack() if self.wide else None
        self.waiting_from: Any = None  # the row whose sums wait first on the stack

    def text(self) -> str:
        """Write the loops and return the module."""
        e, table = self.e, self.arguments
        _, first_tile, stop_tile, first_row, stop_row = e.function.args
        self.row_pointer_bytes = e.b.mul(e.b.add(table[Argument.ROWS], e.int64(1)), e.int64(4))
        self.last_block = e.b.sub(table[Argument.BLOCKS], e.int64(1))
        with e.loop(first_tile, stop_tile) as tile:
            column = e.b.mul(tile, e.int64(self.spec.lanes * self.spec.vectors))
            column = e.b.mul(e.b.add(column, table[Argument.FIRST_COLUMN]), e.int64(e.element_bytes))  # in bytes
            if self.wide:
                self._some_rows(first_row, stop_row, column)
            else:
                self._blocks(first_row, stop_row, column)
        e.b.ret_void()
        return e.text()

    def _some_rows(self, first_row: Any, stop_row: Any, column: Any) -> None:
        """Work on as many rows at a time as have room for their sums on the stack."""
        e, rows = self.e, self.spec.waiting_rows
        with e.loop(first_row, stop_row, step=rows) as row:
            self.waiting_from = row
            self._blocks(row, e.least(e.b.add(row, e.int64(rows)), stop_row), column)

    def _blocks(self, first_row: Any, stop_row: Any, column: Any) -> None:
        """Work on all blocks of some rows, one after the other."""
        e, table = self.e, self.arguments
        with e.loop(e.int64(0), table[Argument.BLOCKS]) as block:
            pointers = e.address(table[Argument.ROW_POINTERS], e.b.mul(block, self.row_pointer_bytes))
            first = e.b.icmp_signed("==", block, e.int64(0))
            last = e.b.icmp_signed("==", block, self.last_block)
            rest = self._groups(first_row, stop_row, column, pointers, first, last)
            with e.loop(rest, stop_row) as row:
                self._row(row, column, pointers, first, last)

    def _groups(self, first_row: Any, stop_row: Any, column: Any, pointers: Any, first: Any, last: Any) -> Any:
        """Work on rows that share their columns, as many at a time as are together; return the first row left over."""
        e, together = self.e, self.e.int64(self.spec.together)
        if self.spec.together == 1:
            return first_row
        groups = e.b.sdiv(e.b.sub(stop_row, first_row), together)
        with e.loop(e.int64(0), groups) as group:
            row = e.b.add(first_row, e.b.mul(group, together))
            rows = [e.b.add(row, e.int64(which)) for which in range(self.spec.together)]
            self._rows(rows, column, pointers, first, last)
        return e.b.add(first_row, e.b.mul(groups, together))

    def _rows(self, rows: list[Any], column: Any, pointers: Any, first: Any, last: Any) -> None:
        """Load each activation once for several rows; the order of a row's sums is that of `_row`."""
        e, table, width = self.e, self.arguments, self.spec.vectors
        pitch, size = table[Argument.OUTPUT_PITCH], VALUE_BYTES[self.spec.value]
        outputs = [e.address(e.address(table[Argument.OUTPUT], e.b.mul(row, pitch)), column) for row in rows]

        def each(make: Callable[[Any, Any, list[Any]], list[Any]], found: list[Any]) -> list[Any]:
            parts = [found[place * width : (place + 1) * width] for place in range(len(rows))]
            return [one for item in zip(rows, outputs, parts, strict=True) for one in make(*item)]

        sums = e.either(
            first,
            lambda: each(lambda row, _, __: self._start(row), []),
            lambda: each(lambda row, o, __: self._resume(row, o), []),
        )
        entry = e.address(pointers, e.b.mul(rows[0], e.int64(4)))
        begins = [
            e.b.sext(e.b.load(e.address(entry, e.int64(4 * which)), typ=e.i32, align=4), e.i64)
            for which in range(len(rows))
        ]
        values = [e.address(table[Argument.VALUES], e.b.mul(begin, e.int64(size))) for begin in begins]
        activations = e.address(table[Argument.INPUT], column)

        def add(begin: Any, end: Any, sums: list[Any]) -> list[Any]:
            with e.reducing_loop(begin, end, sums) as (index, carried, following):
                inputs = e.address(activations, self._offset(index))
                loaded = self._load_all(inputs)
                at = e.b.mul(e.b.sub(index, begins[0]), e.int64(size))
                for place, base in enumerate(values):
                    weight = e.broadcast(self._stored(e.address(base, at)))
                    own = carried[place * width : (place + 1) * width]
                    following += [e.multiply_add(weight, x, y) for x, y in zip(loaded, own, strict=True)]
            return following

        sums = self._in_runs(begins[0], begins[1], sums, add)
        e.either(
            last,
            lambda: each(lambda row, output, own: self._finish(own, row, column, output), sums),
            lambda: each(lambda row, output, own: self._interrupt(own, row, output), sums),
        )

    def _row(self, row: Any, column: Any, pointers: Any, first: Any, last: Any) -> None:
        e, table = self.e, self.arguments
        output = e.address(table[Argument.OUTPUT], e.b.mul(row, table[Argument.OUTPUT_PITCH]))
        output = e.address(output, column)

        def start() -> list[Any]:
            self._prefetch_next(output, Argument.OUTPUT_PITCH, write=True)
            return self._start(row)

        sums = e.either(first, start, lambda: self._resume(row, output))
        entry = e.address(pointers, e.b.mul(row, e.int64(4)))
        begin, end = (
            e.b.sext(e.b.load(e.address(entry, e.int64(4 * which)), typ=e.i32, align=4), e.i64) for which in (0, 1)
        )

        def add(begin: Any, end: Any, sums: list[Any]) -> list[Any]:
            sums = sums + [e.zeros()] * (self.spec.vectors * (self.spec.chains - 1))
            unrolled_end = e.b.add(begin, e.b.and_(e.b.sub(end, begin), e.int64(-_UNROLL)))
            activations = e.address(table[Argument.INPUT], column)
            with e.reducing_loop(begin, unrolled_end, sums, step=_UNROLL) as (index, carried, following):
                following += carried
                for step, weight in enumerate(self._weights(index)):
                    self._add_products(weight, e.b.add(index, e.int64(step)), step, activations, following)
            with e.reducing_loop(unrolled_end, end, following) as (index, carried, remaining):
                remaining += carried
                self._add_products(e.broadcast(self._value(index)), index, 0, activations, remaining)
            return self._add_chains(remaining)

        sums = self._in_runs(begin, end, sums, add)
        e.either(last, lambda: self._finish(sums, row, column, output), lambda: self._interrupt(sums, row, output))

    def _in_runs(
        self, begin: Any, end: Any, sums: list[Any], add: Callable[[Any, Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """Add products to sums: at once, or if sums are wider than products, so many of them at a time."""
        if not self.wide:
            return add(begin, end, sums)
        e = self.e
        with e.reducing_loop(begin, end, sums, step=self.spec.run) as (index, carried, following):
            found = add(index, e.least(e.b.add(index, e.int64(self.spec.run)), end), [e.zeros()] * len(sums))
            following += [e.b.fadd(sum_, e.widened(run)) for sum_, run in zip(carried, found, strict=True)]
        return following

    def _stack(self) -> Any:
        """Return memory for the sums of some rows; every page of it is touched in order, as the system wants it."""
        e, spec = self.e, self.spec
        e.attributes.append('"probe-stack"="inline-asm"')
        return e.reserved(4 * spec.lanes * spec.vectors * spec.waiting_rows)

    def _waiting_at(self, row: Any, vector: int) -> Any:
        place = self.e.b.mul(self.e.b.sub(row, self.waiting_from), self.e.int64(self.spec.vectors))
        place = self.e.b.add(place, self.e.int64(vector))
        return self.e.address(self.waiting, self.e.b.mul(place, self.e.int64(4 * self.spec.lanes)))

    def _resume(self, row: Any, output: Any) -> list[Any]:
        """Return the sums of the blocks so far."""
        if not self.wide:
            return self._load_all(output)
        places = [self._waiting_at(row, vector) for vector in range(self.spec.vectors)]
        return [self.e.b.load(place, typ=self.e.vector, align=4) for place in places]

    def _interrupt(self, sums: list[Any], row: Any, output: Any) -> list[Any]:
        """Leave sums for the next block."""
        if not self.wide:
            return self._store_all(sums, output)
        for vector, found in enumerate(sums):
            self.e.b.store(found, self._waiting_at(row, vector), align=4)
        return []

    def _add_products(self, weight: Any, index: Any, step: int, activations: Any, sums: list[Any]) -> None:
        """Add one weight's products to the sums of its chain, in place."""
        e, spec = self.e, self.spec
        inputs = e.address(activations, self._offset(index))
        chain = step % spec.chains
        for vector in range(spec.vectors):
            slot = chain * spec.vectors + vector
            sums[slot] = e.multiply_add(weight, self._load(inputs, vector), sums[slot])

    def _offset(self, index: Any) -> Any:
        e, indices = self.e, self.arguments[Argument.INDICES]
        if self.spec.index == "offset32":
            offset = e.b.load(e.address(indices, e.b.mul(index, e.int64(4))), typ=e.i32, align=4)
            return e.b.sext(offset, e.i64)
        column = e.b.load(e.address(indices, e.b.mul(index, e.int64(2))), typ=e.i16, align=2)
        return e.b.mul(e.b.zext(column, e.i64), e.int64(self.vector_bytes * self.spec.vectors))

    def _weights(self, index: Any) -> list[Any]:
        """Return the weights of one round, each in all lanes; narrow ones are loaded and widened together."""
        e, value = self.e, self.spec.value
        if value == "float32" or self.spec.element == "float16":
            return [e.broadcast(self._value(e.b.add(index, e.int64(step)))) for step in range(_UNROLL)]
        stored = e.stored_type(value)
        entry = e.address(self.arguments[Argument.VALUES], e.b.mul(index, e.int64(VALUE_BYTES[value])))
        together = e.b.load(entry, typ=e.ir.VectorType(stored, _UNROLL), align=VALUE_BYTES[value])
        widened = e.widen(together, value)
        return [e.broadcast_lane(widened, step) for step in range(_UNROLL)]

    def _value(self, index: Any) -> Any:
        e, size = self.e, VALUE_BYTES[self.spec.value]
        return self._stored(e.address(self.arguments[Argument.VALUES], e.b.mul(index, e.int64(size))))

    def _stored(self, entry: Any) -> Any:
        e, value = self.e, self.spec.value
        if self.spec.element == "float16":
            return e.b.load(entry, typ=e.element, align=2)
        return e.widen(e.b.load(entry, typ=e.stored_type(value), align=VALUE_BYTES[value]), value)

    def _start(self, row: Any) -> list[Any]:
        """Return what sums begin with: the bias, unless scales come first."""
        if self.spec.bias and not self.spec.scaled:
            bias = self._of_row(Argument.BIAS, row)
            return [bias if self.spec.accumulator == "float32" else self.e.narrowed(bias)] * self.spec.vectors
        return [self.e.splat(0.0) if self.wide else self.e.zeros()] * self.spec.vectors

    def _of_row(self, argument: Argument, row: Any) -> Any:
        """Return a row's number of an array of them, in all lanes."""
        entry = self.e.address(self.arguments[argument], self.e.b.mul(row, self.e.int64(4)))
        return self.e.broadcast(self.e.b.load(entry, typ=self.e.f32, align=4))

    def _scaled(self, sums: list[Any], row: Any) -> list[Any]:
        scale = self._of_row(Argument.SCALES, row)
        if not self.spec.bias:
            return [self.e.b.fmul(vector, scale) for vector in sums]
        bias = self._of_row(Argument.BIAS, row)
        return [self.e.multiply_add(vector, scale, bias) for vector in sums]

    def _add_chains(self, sums: list[Any]) -> list[Any]:
        while len(sums) > self.spec.vectors:
            half = len(sums) // 2
            sums = [self.e.b.fadd(a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        return sums

    def _finish(self, sums: list[Any], row: Any, column: Any, output: Any) -> list[Any]:
        """Do what the last block does at the store: scale, residual, activation, mask of columns."""
        e, table, spec = self.e, self.arguments, self.spec
        if spec.scaled:
            sums = self._scaled(sums, row)
        if spec.residual:
            residual = e.address(table[Argument.RESIDUAL], e.b.mul(row, table[Argument.RESIDUAL_PITCH]))
            residual = e.address(residual, column)
            self._prefetch_next(residual, Argument.RESIDUAL_PITCH, write=False)
            added = self._load_all(residual)
            added = [e.widened(vector) for vector in added] if self.wide else added
            sums = [e.b.fadd(a, b) for a, b in zip(sums, added, strict=True)]
        sums = [self._activated(vector) for vector in sums]
        if spec.keep:
            keep = e.address(table[Argument.KEEP], column)
            for vector in range(spec.vectors):
                entry = e.address(keep, e.int64(vector * self.vector_bytes))
                bits = e.b.load(entry, typ=e.element_integers, align=e.element_bytes)
                sums[vector] = e.keep_lanes(sums[vector], bits)
        return self._store_all(sums, output)

    def _activated(self, vector: Any) -> Any:
        """Return what is stored. ReLU would hide an infinity below zero, which float16 may have made: it gives NaN."""
        e, activation = self.e, self.spec.activation
        if self.spec.element == "float32":
            return e.activate(vector, activation)
        if activation == "relu":
            return e.narrowed(e.exposed(e.activate(vector, activation), vector))
        return e.narrowed(vector if activation is None else e.activate(e.widened(vector), activation))

    def _prefetch_next(self, base: Any, pitch: Argument, *, write: bool) -> None:
        """Ask for a tile's columns of a row that comes soon, or of what lies behind the last one."""
        ahead = self.e.b.mul(self.arguments[pitch], self.e.int64(_AHEAD))
        self.e.prefetch(self.e.address(base, ahead), self.spec.vectors * self.vector_bytes, write=write)

    def _load(self, base: Any, vector: int) -> Any:
        pointer = self.e.address(base, self.e.int64(vector * self.vector_bytes))
        return self.e.load_vector(pointer, self._mask_of(vector))

    def _load_all(self, base: Any) -> list[Any]:
        return [self._load(base, vector) for vector in range(self.spec.vectors)]

    def _store_all(self, sums: list[Any], base: Any) -> list[Any]:
        for vector, value in enumerate(sums):
            pointer = self.e.address(base, self.e.int64(vector * self.vector_bytes))
            self.e.store_vector(value, pointer, self._mask_of(vector))
        return []

    def _mask_of(self, vector: int) -> Any:
        return self.mask if vector == self.spec.vectors - 1 else None


def product_ir(spec: ProductSpecification) -> str:
    """Return the LLVM IR of a product kernel."""
    return _Product(spec).text()
