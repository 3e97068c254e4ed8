"""The format of sparse weights: kept weights row by row, block of columns by block of columns.

Weights of one block read activation rows that stay in the cache while all rows of the matrix pass over them. Numbers
lie in the order in which a kernel reads them.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError

_PADDING = 64  # bytes behind every array, so that a vector may be read at its end
_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class CSRBlocks:
    """A sparse float32 matrix, its columns cut into blocks that share activations in the cache.

    Build it with `from_dense` or `from_csr`. ``values`` may be refreshed with `gather_`; nothing else changes.
    """

    rows: int
    columns: int
    block_columns: int
    row_pointers: Tensor  # int32, (blocks, rows + 1): into positions and values
    positions: Tensor  # int32, (kept,): row-major index in the dense matrix, in the order of reading
    values: Tensor = field(repr=False)  # float32, (kept,), with padding behind it

    @property
    def kept(self) -> int:
        """Number of weights that are kept, zeros among them included."""
        return self.positions.numel()

    @property
    def blocks(self) -> int:
        """Number of blocks of columns, at least one."""
        return self.row_pointers.shape[0]

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, *, keep: Tensor | None = None, block_columns: int | None = None) -> Self:
        """Take the kept weights of a dense matrix.

        Args:
            weight: (rows, ...), float32, on the CPU; axes behind the first are flattened row-major.
            keep: Bool, of the weight's shape; without it the weights that are not zero are kept (NaN is not zero).
            block_columns: Columns a block; all of them by default.

        Raises:
            ConfigError: If the dtype, device, mask or block does not fit, or the matrix has 2**31 or more elements.
        """
        check_float32(weight, "the weight")
        if keep is not None and (keep.dtype != torch.bool or keep.shape != weight.shape):
            raise ConfigError(f"keep is {keep.dtype} {tuple(keep.shape)}; expected bool {tuple(weight.shape)}")
        rows = weight.shape[0] if weight.dim() else 0
        if weight.numel() == 0:
            raise ConfigError(f"a weight of shape {tuple(weight.shape)} has no kernel; expected at least one element")
        matrix = weight.detach().reshape(rows, -1)
        mask = matrix != 0 if keep is None else keep.reshape(matrix.shape)
        flat = mask.reshape(-1).nonzero().squeeze(1)
        return cls._from_positions((rows, matrix.shape[1]), flat, matrix.reshape(-1)[flat], block_columns)

    @classmethod
    @torch.no_grad()
    def from_csr(
        cls,
        shape: tuple[int, int],
        *,
        row_pointers: Tensor,
        column_indices: Tensor,
        values: Tensor,
        block_columns: int | None = None,
    ) -> Self:
        """Take a matrix in plain CSR, such as a file holds, after a check of every index.

        Args:
            shape: (rows, columns).
            row_pointers: (rows + 1,), int32 or int64.
            column_indices: (kept,), int32 or int64, rising within a row.
            values: (kept,), float32.
            block_columns: Columns a block; all of them by default.

        Raises:
            ConfigError: If an array has another length or dtype, or an index is out of range or out of order.
        """
        rows, columns = shape
        _check_size(rows, columns)
        check_float32(values, "the values")
        for name, array in (("row_pointers", row_pointers), ("column_indices", column_indices)):
            if array.dtype not in (torch.int32, torch.int64) or array.dim() != 1:
                raise ConfigError(f"{name} is {array.dtype} with {array.dim()} axes; expected one axis, int32 or int64")
        kept = column_indices.numel()
        if row_pointers.numel() != rows + 1 or values.numel() != kept:
            found = f"{row_pointers.numel()} row pointers, {kept} columns, {values.numel()} values"
            raise ConfigError(
                f"{found} for a matrix of {rows} rows; expected {rows + 1}, and equally many of the others"
            )
        pointers, within = row_pointers.long(), column_indices.long()
        counts = pointers.diff()
        if int(pointers[0]) != 0 or int(pointers[-1]) != kept or bool((counts < 0).any()):
            raise ConfigError(f"row pointers must rise from 0 to {kept}")
        if kept and (int(within.min()) < 0 or int(within.max()) >= columns):
            found = f"{int(within.min())} to {int(within.max())}"
            raise ConfigError(f"column indices run from {found}; expected 0 to {columns - 1}")
        flat = torch.repeat_interleave(torch.arange(rows), counts) * columns + within
        if bool((flat.diff() <= 0).any()):
            raise ConfigError("column indices must rise within each row, without repetition")
        return cls._from_positions((rows, columns), flat, values.reshape(-1), block_columns)

    @classmethod
    def _from_positions(cls, shape: tuple[int, int], flat: Tensor, values: Tensor, block_columns: int | None) -> Self:
        rows, columns = shape
        _check_size(rows, columns)
        width = columns if block_columns is None else block_columns
        if width < 1:
            raise ConfigError(f"block_columns={width}; expected at least 1")
        width = min(width, columns)
        blocks = -(-columns // width)
        block = (flat % columns) // width
        order = torch.sort(block, stable=True).indices if blocks > 1 else slice(None)
        counts = torch.bincount(block * rows + flat // columns, minlength=blocks * rows).reshape(blocks, rows)
        ends = counts.reshape(-1).cumsum(0).reshape(blocks, rows)
        starts = (ends - counts)[:, :1]
        return cls(
            rows=rows,
            columns=columns,
            block_columns=width,
            row_pointers=torch.cat([starts, ends], dim=1).to(torch.int32),
            positions=flat[order].to(torch.int32),
            values=padded(values[order]),
        )

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """Return the dense matrix, (rows, columns), float32, zero where nothing is kept."""
        dense = torch.zeros(self.rows * self.columns)
        dense[self.positions.long()] = self.values
        return dense.reshape(self.rows, self.columns)

    @torch.no_grad()
    def gather_(self, weight: Tensor) -> None:
        """Read the kept weights anew from the dense weight, in place: what training does after each step.

        Args:
            weight: As given to `from_dense`.

        Raises:
            ConfigError: If its size or dtype differs.
        """
        check_float32(weight, "the weight")
        if weight.numel() != self.rows * self.columns:
            raise ConfigError(f"the weight has {weight.numel()} elements; expected {self.rows * self.columns}")
        torch.index_select(weight.detach().reshape(-1), 0, self.positions, out=self.values)

    @torch.no_grad()
    def offsets(self, column_offsets: Tensor, row_offsets: Tensor | None = None) -> Tensor:
        """Return, for every kept weight, how many bytes behind the input's start its activations begin.

        Args:
            column_offsets: int64, (columns,): where the activations of each column begin, in bytes.
            row_offsets: int64, (rows,): added for the rows of a group, in bytes.

        Returns:
            int32, (kept,), with padding behind it.

        Raises:
            ConfigError: If an offset is negative or beyond 2**31 - 1.
        """
        found = column_offsets[(self.positions % self.columns).long()]
        if row_offsets is not None:
            found = found + row_offsets[(self.positions // self.columns).long()]
        if found.numel() and (int(found.min()) < 0 or int(found.max()) > _LIMIT):
            raise ConfigError(
                f"activations from byte {int(found.min())} to {int(found.max())} are out of reach of 32-bit offsets; "
                f"the last row may begin at {_LIMIT}: split the columns"
            )
        return padded(found.to(torch.int32))

    def row_ranges(self, parts: int) -> list[tuple[int, int]]:
        """Cut the rows into at most ``parts`` ranges of about equal work.

        >>> CSRBlocks.from_dense(torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 3.0]])).row_ranges(2)
        [(0, 1), (1, 3)]
        """
        work = self.row_pointers.diff(dim=1).sum(0) + 1  # a row costs something even when it is empty
        done = work.cumsum(0)
        targets = torch.arange(1, parts) * int(done[-1]) / parts
        cuts = sorted({0, self.rows, *(torch.searchsorted(done, targets) + 1).tolist()})
        return list(pairwise(cuts))


def padded(array: Tensor) -> Tensor:
    """Return a contiguous copy with at least a cache line of zeros behind it, in the same storage."""
    size = array.numel()
    storage = torch.zeros(size + _PADDING // array.element_size(), dtype=array.dtype)
    storage[:size] = array.reshape(-1)
    return storage[:size]


def _check_size(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1 or rows * columns > _LIMIT:
        raise ConfigError(f"a matrix of {rows} x {columns} has no kernel; expected 1 to {_LIMIT} elements")


def check_float32(tensor: Tensor, name: str) -> None:
    """Refuse what is not a float32 tensor on the CPU.

    Raises:
        ConfigError: By ``name``.
    """
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ConfigError(
            f"{name} is {tensor.dtype} on {tensor.device}, {tensor.layout}; expected dense float32 on the CPU"
        )
