"""A sparse matrix against tiles of columns: which kernels run, on what addresses, cut into pieces for threads."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import CSRBlocks
from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._pool import Piece, Pool
from sparsetwin.kernels._product_ir import Argument
from sparsetwin.kernels._specification import (
    Activation,
    Element,
    ProductSpecification,
    lanes_of,
    max_vectors,
    rows_together,
    value_format,
)
from sparsetwin.kernels._target import Target
from sparsetwin.kernels._team import KernelPiece

_Table = ctypes.c_int64 * len(Argument)
_WORTH = 1 << 20  # multiply-adds below which waking another thread costs more than it saves
_SHARED = 1 << 16  # the same where threads wait for each other in machine code
_HALF_TERMS = 16  # products of a float16 sum; twice as many in long rows
_LONG_ROW = 96
_PIECES = 8  # a thread, so that one that is late does not hold up the others for long


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What is done to a sum before it is stored: bias, then residual, then activation."""

    bias: Tensor | None = None  # float32, (rows,)
    residual: bool = False  # whether calls bring a residual
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut and stored; what is None is chosen by the sizes. The best is found by measuring."""

    vectors: int | None = None  # a tile's width
    block: int | None = None  # weight columns (of a product) or input channels (of a convolution) that share a block
    narrow: bool = False  # leave the values of a `KeptWeight` in their few bits, to be widened in the kernel
    target: Target | str | None = None  # what to compile for; this machine's best if None


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where one call reads and writes; pitches are bytes from row to row."""

    input: int
    output: int
    output_pitch: int
    residual: int = 0
    residual_pitch: int = 0
    keep: int = 0


def default_vectors(columns: int, target: Target, element: Element = "float32") -> int:
    """Return how many vectors a tile gets when nothing was measured: at most eight, all tiles about equal.

    >>> from sparsetwin.kernels._target import AVX2
    >>> [default_vectors(columns, AVX2) for columns in (1, 64, 128, 210, 3192)]
    [1, 8, 8, 7, 8]
    """
    most = min(8, max_vectors(target) if element == "float32" else (target.registers - 2) // 4)  # `half_chains`
    vectors = max(1, -(-columns // lanes_of(target, element)))
    tiles = -(-vectors // most)
    return -(-vectors // tiles)


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledProduct:
    """A prepared product. It holds no state that a call changes, so calls may run at once."""

    matrix: CSRBlocks
    indices: Tensor = field(repr=False)
    columns: int
    epilogue: Epilogue
    tile_columns: int
    full: Kernel | None  # whole tiles
    tail: Kernel | None  # the columns left over
    last_lanes: int

    def pieces(self, at: Addresses, *, threads: int) -> list[KernelPiece]:
        """Return the work of one call as functions that may run in any order."""
        full_tiles = self.columns // self.tile_columns
        threads = threads if worth_threads(self.matrix, self.columns, least=_SHARED) else 1
        work: list[KernelPiece] = []
        if self.full is not None:
            table = self._table(at, 0)
            work += _cut(self.full, table, full_tiles, self.matrix, threads)
        if self.tail is not None:
            table = self._table(at, full_tiles * self.tile_columns)
            work += _cut(self.tail, table, 1, self.matrix, threads if full_tiles < _PIECES * threads else 1)
        return work

    def run(self, at: Addresses, pool: Pool | None) -> None:
        """Run one call to its end."""
        pool = pool if worth_threads(self.matrix, self.columns) else None
        run_pieces(self.pieces(at, threads=pool.threads if pool else 1), pool)

    def _table(self, at: Addresses, first_column: int) -> "ctypes.Array[ctypes.c_int64]":
        bias = self.epilogue.bias
        return _Table(
            self.matrix.blocks,
            self.matrix.rows,
            self.matrix.row_pointers.data_ptr(),
            self.indices.data_ptr(),
            self.matrix.values.data_ptr(),
            at.input,
            at.output,
            at.output_pitch,
            bias.data_ptr() if bias is not None else 0,
            at.residual,
            at.residual_pitch,
            at.keep,
            first_column,
            self.last_lanes,
            self.matrix.scales.data_ptr() if self.matrix.scales is not None else 0,
        )


def worth_threads(matrix: CSRBlocks, columns: int, *, least: int = _WORTH) -> bool:
    """Tell whether a product has enough work to share; a weight is at least one vector's work."""
    return matrix.kept * max(columns, 8) >= least


def run_pieces(pieces: Sequence[Piece], pool: Pool | None) -> None:
    """Run pieces on a pool, or one after the other without one."""
    if pool is None:
        for piece in pieces:
            piece()
    else:
        pool.run(pieces)


def tiled_product(
    matrix: CSRBlocks,
    indices: Tensor,
    *,
    columns: int,
    target: Target,
    vectors: int | None,
    epilogue: Epilogue,
    keep: bool = False,
    element: Element = "float32",
) -> TiledProduct:
    """Compile what a product of these columns needs.

    Args:
        matrix: The weights; float16 for such activations.
        indices: What `CSRBlocks.offsets` returned.
        columns: Of the activations; with ``keep`` a whole number of vectors.
        target: What to compile for.
        vectors: A tile's, `default_vectors` if None.
        epilogue: What is done at the store.
        keep: Whether calls bring a mask of columns.
        element: Of the activations.

    Raises:
        ConfigError: If a bias does not fit, or the columns or vectors are out of range.
    """
    if columns < 1:
        raise ConfigError(f"columns={columns}; expected at least 1")
    bias = epilogue.bias
    if bias is not None and (tuple(bias.shape) != (matrix.rows,) or not bias.is_contiguous()):
        raise ConfigError(f"the bias has shape {tuple(bias.shape)}; expected contiguous ({matrix.rows},)")
    width = default_vectors(columns, target, element) if vectors is None else vectors
    lanes = lanes_of(target, element)
    tile_columns = width * lanes
    specify = partial(
        ProductSpecification,
        target=target,
        lanes=lanes,
        element=element,
        value=value_format(matrix.values),
        scaled=matrix.scales is not None,
        bias=bias is not None,
        residual=epilogue.residual,
        activation=epilogue.activation,
        keep=keep,
    )
    shared = _rows_share(matrix, indices)

    def made(vectors: int, *, masked: bool = False) -> Kernel:
        together = rows_together(vectors, target) if shared else 1
        specified = partial(specify, vectors=vectors, together=together, masked=masked)
        if element == "float32":
            return kernel(specified(chains=chains(vectors) if together == 1 else 1))
        sums = half_chains(vectors, target) if together == 1 else 1
        run, accumulator = half_run(matrix.longest_row, sums)
        return kernel(specified(chains=sums, run=run, accumulator=accumulator))

    left = columns % tile_columns
    last_lanes = (left - 1) % lanes + 1
    full = made(width) if columns >= tile_columns else None
    tail = None
    if left:
        tail_vectors = -(-left // lanes)
        masked = last_lanes != lanes
        tail = made(tail_vectors, masked=masked)
    return TiledProduct(
        matrix=matrix,
        indices=indices,
        columns=columns,
        epilogue=epilogue,
        tile_columns=tile_columns,
        full=full,
        tail=tail,
        last_lanes=last_lanes,
    )


def dense_vectors(columns: int, target: Target, element: Element = "float32") -> int:
    """Return how many vectors a tile gets by default where no weight is pruned: sums of four rows fill the registers.

    >>> from sparsetwin.kernels._target import AVX2, AVX512
    >>> dense_vectors(3136, AVX2), dense_vectors(3136, AVX512), dense_vectors(16, AVX2)
    (3, 6, 2)
    """
    return min((target.registers - 1) // 5, default_vectors(columns, target, element))


def _rows_share(matrix: CSRBlocks, indices: Tensor) -> bool:
    """Tell whether all rows read the same activations: nothing is pruned, and there is one group."""
    if matrix.kept != matrix.rows * matrix.columns:
        return False
    block = indices[: matrix.rows * matrix.block_columns].view(matrix.rows, matrix.block_columns)
    return bool((block == block[0]).all())


def chains(vectors: int) -> int:
    """Return how many independent sums hide the latency of a multiply-add when there are few vectors."""
    return 4 if vectors == 1 else 2 if vectors <= 3 else 1


def half_chains(vectors: int, target: Target) -> int:
    """Return how many sums a column has in float16: several as long as they fit, since short sums are exacter."""
    return 4 if vectors == 1 else 2 if 4 * vectors + 2 <= target.registers else 1


def half_run(longest: int, sums: int) -> tuple[int, Element]:
    """Return how many products of a row are added in float16 before these sums are added, and in what.

    Each product that is added to a float16 sum costs up to half a unit in its last place. Errors of many short sums
    nearly cancel, so that these may be longer in long rows. Rows of one short sum need no other.

    >>> half_run(20, 2), half_run(90, 2), half_run(500, 2)
    ((32, 'float16'), (32, 'float32'), (64, 'float32'))
    """
    if longest <= _HALF_TERMS * sums:
        return _HALF_TERMS * sums, "float16"
    return (_HALF_TERMS if longest <= _LONG_ROW else 2 * _HALF_TERMS) * sums, "float32"


def _cut(
    compiled: Kernel, table: "ctypes.Array[ctypes.c_int64]", tiles: int, matrix: CSRBlocks, threads: int
) -> list[KernelPiece]:
    """Cut by tiles where there are enough of them, else by rows; neither changes a bit of the result."""

    def piece(tile: int, stop_tile: int, row: int, stop_row: int) -> KernelPiece:
        return KernelPiece(compiled, table, (tile, stop_tile, row, stop_row))

    if threads == 1:
        return [piece(0, tiles, 0, matrix.rows)]
    if tiles >= 2 * threads:
        parts = min(tiles, _PIECES * threads)
        cuts = [tiles * part // parts for part in range(parts + 1)]
        return [piece(begin, end, 0, matrix.rows) for begin, end in pairwise(cuts)]
    ranges = matrix.row_ranges(2 * threads)
    return [piece(tile, tile + 1, begin, end) for tile in range(tiles) for begin, end in ranges]
