"""The format of sparse weights: kept weights row by row, block of columns by block of columns.

Weights of one block read activation rows that stay in the cache while all rows of the matrix pass over them. Numbers
lie in the order in which a kernel reads them; where they belong is one bit a weight, as in a file.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._kept import VALUE_DTYPES, KeptWeight, packed_bits, set_bits

_PADDING = 64  # bytes behind every array, so that a vector may be read at its end
_LIMIT = 2**31 - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class CSRBlocks:
    """A sparse matrix, its columns cut into blocks that share activations in the cache.

    Build it with `from_dense`, `from_csr`, `from_kept` or `from_parts`. ``values`` may be refreshed with `gather_` if
    they are plain float32; nothing else changes.
    """

    rows: int
    columns: int
    block_columns: int
    row_pointers: Tensor  # int32, (blocks, rows + 1): into the values
    bits: Tensor = field(repr=False)  # uint8: one bit a weight of the dense matrix, row-major, the lowest bit first
    values: Tensor = field(repr=False)  # (kept,), in the order of reading, with padding behind it
    scales: Tensor | None = field(repr=False, default=None)  # float32, (rows,): what a row's sums are multiplied with

    @property
    def kept(self) -> int:
        """Number of weights that are kept, zeros among them included."""
        return self.values.numel()

    @property
    def positions(self) -> Tensor:
        """Where the kept weights lie in the dense matrix, row-major, in the order of reading: int32, (kept,)."""
        flat = set_bits(self.bits, self.rows * self.columns)
        return flat[_reading_order(flat, self.columns, self.block_columns)].to(torch.int32)

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
        flat = torch.repeat_interleave(torch.arange(rows, dtype=torch.int64, device="cpu"), counts) * columns + within
        if bool((flat.diff() <= 0).any()):
            raise ConfigError("column indices must rise within each row, without repetition")
        return cls._from_positions((rows, columns), flat, values.reshape(-1), block_columns)

    @classmethod
    @torch.no_grad()
    def from_kept(cls, weight: KeptWeight, *, block_columns: int | None = None, narrow: bool = False) -> Self:
        """Take a weight as a file holds it, without making it dense.

        Args:
            weight: (rows, ...); axes behind the first are flattened row-major.
            block_columns: Columns a block; all of them by default.
            narrow: Whether values stay in their few bits, their rows' scales apart; else they become float32.
        """
        narrow = narrow and weight.is_narrow
        shape = (weight.shape[0], weight.numel // weight.shape[0])
        values = weight.values if narrow else weight.float_values()
        matrix = cls._from_positions(shape, weight.positions(), values, block_columns, bits=weight.bits)
        scales = None if not narrow or weight.scales is None else weight.scales.float()
        return replace(matrix, scales=scales)

    @classmethod
    @torch.no_grad()
    def from_parts(
        cls, shape: tuple[int, int], *, bits: Tensor, values: Tensor, scales: Tensor | None, block_columns: int
    ) -> Self:
        """Put together what another matrix was made of, on the memory of the parts; any bits are a valid matrix.

        Args:
            shape: (rows, columns).
            bits: As the matrix had them.
            values: As the matrix had them, with padding behind them.
            scales: As the matrix had them.
            block_columns: Columns a block.

        Raises:
            ConfigError: If a part does not fit the others.
        """
        rows, columns = shape
        _check_size(rows, columns)
        if not 1 <= block_columns <= columns or values.dtype not in VALUE_DTYPES or values.dim() != 1:
            raise ConfigError(f"block_columns={block_columns}, values {values.dtype} do not fit {rows} x {columns}")
        if scales is not None and (scales.dtype, tuple(scales.shape)) != (torch.float32, (rows,)):
            raise ConfigError(f"scales are {scales.dtype} {tuple(scales.shape)}; expected float32 ({rows},)")
        if bits.dtype != torch.uint8 or tuple(bits.shape) != ((rows * columns + 7) // 8,):
            raise ConfigError(f"a matrix of {rows} x {columns} has {(rows * columns + 7) // 8} bytes of bits, uint8")
        flat = set_bits(bits, rows * columns)
        if flat.numel() != values.numel():
            raise ConfigError(f"{values.numel()} values, but the bits keep {flat.numel()}")
        pointers = _row_pointers(flat, rows, columns, block_columns)
        return cls(
            rows=rows,
            columns=columns,
            block_columns=block_columns,
            row_pointers=pointers,
            bits=bits,
            values=values,
            scales=scales,
        )

    @classmethod
    def _from_positions(
        cls, shape: tuple[int, int], flat: Tensor, values: Tensor, block_columns: int | None, bits: Tensor | None = None
    ) -> Self:
        rows, columns = shape
        _check_size(rows, columns)
        width = columns if block_columns is None else block_columns
        if width < 1:
            raise ConfigError(f"block_columns={width}; expected at least 1")
        width = min(width, columns)
        if bits is None:
            mask = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
            mask[flat] = True
            bits = packed_bits(mask)
        return cls(
            rows=rows,
            columns=columns,
            block_columns=width,
            row_pointers=_row_pointers(flat, rows, columns, width),
            bits=bits,
            values=padded(values[_reading_order(flat, columns, width)]),
        )

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """Return the dense matrix, (rows, columns), float32, zero where nothing is kept."""
        dense = torch.zeros(self.rows * self.columns, dtype=torch.float32, device="cpu")
        dense[self.positions.long()] = self.values.float()
        dense = dense.reshape(self.rows, self.columns)
        return dense if self.scales is None else dense.mul_(self.scales.unsqueeze(1))

    @torch.no_grad()
    def to_kept(self, shape: tuple[int, ...]) -> KeptWeight:
        """Return the same weights as a file would hold them, of a shape with as many rows and elements."""
        scales = None if self.scales is None else self.scales.double()
        return KeptWeight(shape=shape, bits=self.bits, values=self.in_one_block().values, scales=scales)

    @torch.no_grad()
    def in_one_block(self) -> "CSRBlocks":
        """Return the same weights, all columns in one block."""
        if self.blocks == 1:
            return self
        flat = set_bits(self.bits, self.rows * self.columns)
        values = torch.empty(self.kept, dtype=self.values.dtype, device="cpu")
        values[_reading_order(flat, self.columns, self.block_columns)] = self.values
        return replace(
            self,
            block_columns=self.columns,
            row_pointers=_row_pointers(flat, self.rows, self.columns, self.columns),
            values=padded(values),
        )

    @torch.no_grad()
    def in_half(self, factor: float = 1.0) -> "CSRBlocks":
        """Return the same weights times a number, scales applied, rounded once to float16."""
        if self.values.dtype == torch.float16 and self.scales is None and factor == 1:
            return self
        values = self.values.double() * factor
        if self.scales is not None:
            values = values * self.scales.double()[(self.positions // self.columns).long()]
        return replace(self, values=padded(values.half()), scales=None)

    @property
    def longest_row(self) -> int:
        """The most weights that a row keeps, in all blocks together."""
        return int(self.row_pointers.diff(dim=1).sum(0).max())

    @torch.no_grad()
    def gather_(self, weight: Tensor) -> None:
        """Read the kept weights anew from the dense weight, in place: what training does after each step.

        Args:
            weight: As given to `from_dense`.

        Raises:
            ConfigError: If its size or dtype differs, or values are kept in fewer bits or with scales.
        """
        check_float32(weight, "the weight")
        if self.values.dtype != torch.float32 or self.scales is not None:
            raise ConfigError(f"values in {self.values.dtype} are not refreshed; expected float32 without scales")
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
        positions = self.positions
        found = column_offsets[(positions % self.columns).long()]
        if row_offsets is not None:
            found = found + row_offsets[(positions // self.columns).long()]
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
        targets = torch.arange(1, parts, dtype=torch.float64, device="cpu") * int(done[-1]) / parts
        cuts = sorted({0, self.rows, *(torch.searchsorted(done, targets) + 1).tolist()})
        return list(pairwise(cuts))


def padded(array: Tensor) -> Tensor:
    """Return a contiguous copy with at least a cache line of zeros behind it, in the same storage."""
    size = array.numel()
    storage = torch.zeros(size + _PADDING // array.element_size(), dtype=array.dtype, device="cpu")
    storage[:size] = array.reshape(-1)
    return storage[:size]


def packed(weight: KeptWeight | Tensor, block_columns: int, *, narrow: bool) -> CSRBlocks:
    """Return the matrix of a weight, dense with zeros or kept; only kept ones can have narrow values."""
    if isinstance(weight, Tensor):
        return CSRBlocks.from_dense(weight, block_columns=block_columns)
    return CSRBlocks.from_kept(weight, block_columns=block_columns, narrow=narrow)


def density(weight: KeptWeight | Tensor) -> float:
    """Return the fraction of a weight that is kept."""
    return weight.density if isinstance(weight, KeptWeight) else int(weight.count_nonzero()) / weight.numel()


def _reading_order(flat: Tensor, columns: int, width: int) -> Tensor | slice:
    """Return the order in which weights at rising positions are read: block by block, then row by row."""
    if width >= columns:
        return slice(None)
    return torch.sort((flat % columns) // width, stable=True).indices


def _row_pointers(flat: Tensor, rows: int, columns: int, width: int) -> Tensor:
    blocks = -(-columns // width)
    counts = torch.bincount((flat % columns) // width * rows + flat // columns, minlength=blocks * rows)
    counts = counts.reshape(blocks, rows)
    ends = counts.reshape(-1).cumsum(0).reshape(blocks, rows)
    return torch.cat([(ends - counts)[:, :1], ends], dim=1).to(torch.int32)


def _check_size(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1 or rows * columns > _LIMIT:
        raise ConfigError(f"a matrix of {rows} x {columns} has no kernel; expected 1 to {_LIMIT} elements")


def check_float32(tensor: Tensor, name: str) -> None:
    """Refuse what is not a float32 tensor on the CPU.

    Raises:
        ConfigError: By ``name``.
    """
    check_dense(tensor, name, torch.float32)


def check_dense(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    """Refuse what is not a tensor of a dtype on the CPU.

    Raises:
        ConfigError: By ``name``.
    """
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        expected = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"{name} is {tensor.dtype} on {tensor.device}, {tensor.layout}; expected dense {expected} on the CPU"
        )
