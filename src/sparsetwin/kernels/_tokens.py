"""One to eight tokens against a sparse matrix: few activations, so what counts is the bytes of the weights.

Two formats. ``columns``: a 16-bit column and a value for each kept weight, 6 bytes in float32 and 3 in int8; lanes over
tokens. ``bitmask``: one bit for each weight and a value for each kept one; lanes over columns, for targets that unpack
values by a mask. Values in bfloat16 or float16 are rounded once, when the product is made; sums are float32.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._bitmask_ir import BitmaskArgument, BitmaskSpecification
from sparsetwin.kernels._blocks import CSRBlocks, check_float32, padded
from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._launch import chains, run_pieces, worth_threads
from sparsetwin.kernels._pool import Piece, Pool
from sparsetwin.kernels._product_ir import Argument
from sparsetwin.kernels._specification import (
    VALUE_BYTES,
    Activation,
    ProductSpecification,
    ValueFormat,
    value_format,
)
from sparsetwin.kernels._target import Target, checked_target

TokenFormat = Literal["columns", "bitmask"]
MAX_TOKENS = 8
COLUMNS_LIMIT = 1 << 16
_ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def default_format(density: float, *, value: ValueFormat, target: Target) -> TokenFormat:
    """Return the format with fewer bytes a weight among those that a target is fast at."""
    size = VALUE_BYTES[value]
    unpacks = target.expands if value == "float32" else "avx512vbmi2" in target.features
    return "bitmask" if unpacks and size * density + 1 / 8 < (size + 2) * density else "columns"


class TokenProduct:
    """``y = activation(x W^T + bias)`` for a sparse W and one to eight rows of x.

    Pruned weights pass nothing on, as in `SparseProduct`. Calls may run at once.

    Args:
        weight: (M, K), float32, K at most 65,536; or `CSRBlocks` of one block, whose narrow values stay as they are.
        tokens: Rows of x, 1 to 8.
        bias: (M,), float32.
        activation: Fused at the store.
        value: How float32 weights are stored: so, or rounded to ``"bfloat16"`` or ``"float16"``.
        layout: ``"columns"`` or ``"bitmask"``; `default_format` by default.
        target: What to compile for, or its name; this machine's best by default.

    Raises:
        ConfigError: If something does not fit, or no kernel can be made here.
    """

    def __init__(
        self,
        weight: CSRBlocks | Tensor,
        *,
        tokens: int,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        value: ValueFormat = "float32",
        layout: TokenFormat | None = None,
        target: Target | str | None = None,
    ) -> None:
        chosen = checked_target(target)
        matrix = CSRBlocks.from_dense(weight) if isinstance(weight, Tensor) else weight
        if matrix.blocks != 1:
            raise ConfigError(f"the matrix has {matrix.blocks} blocks of columns; token products take one")
        if not 1 <= tokens <= MAX_TOKENS:
            raise ConfigError(f"tokens={tokens}; expected 1 to {MAX_TOKENS}, beyond that use SparseProduct")
        if bias is not None:
            check_float32(bias, "the bias")
            bias = bias.detach().contiguous()
            if tuple(bias.shape) != (matrix.rows,):
                raise ConfigError(f"the bias has shape {tuple(bias.shape)}; expected ({matrix.rows},)")
        self.matrix = matrix
        self.tokens = tokens
        if matrix.values.dtype != torch.float32:
            value = value_format(matrix.values)
        elif value not in ("float32", *_ROUNDED):
            raise ConfigError(f"value={value!r}; expected 'float32', {', '.join(map(repr, _ROUNDED))}")
        density = matrix.kept / (matrix.rows * matrix.columns)
        self.layout = layout or default_format(density, value=value, target=chosen)
        self._bias = bias
        self._scales = matrix.scales
        self._values = matrix.values
        if value in _ROUNDED and matrix.values.dtype == torch.float32:
            self._values = padded(matrix.values.to(_ROUNDED[value]))
        make = {"columns": self._make_columns, "bitmask": self._make_bitmask}.get(self.layout)
        if make is None:
            raise ConfigError(f"layout={layout!r}; expected 'columns' or 'bitmask'")
        self._run = make(chosen, value, activation)

    @torch.no_grad()
    def __call__(self, x: Tensor, *, pool: Pool | None = None) -> Tensor:
        """Multiply.

        Args:
            x: (tokens, K), float32, contiguous.
            pool: Threads; the caller's alone by default.

        Returns:
            (tokens, M), float32, contiguous.

        Raises:
            ConfigError: If x has another shape, dtype or layout.
        """
        check_float32(x, "x")
        if tuple(x.shape) != (self.tokens, self.matrix.columns) or not x.is_contiguous():
            expected = (self.tokens, self.matrix.columns)
            raise ConfigError(f"x has shape {tuple(x.shape)}, strides {x.stride()}; expected contiguous {expected}")
        return self._run(x, pool)

    def _make_columns(
        self, target: Target, value: ValueFormat, activation: Activation | None
    ) -> Callable[[Tensor, Pool | None], Tensor]:
        matrix = self.matrix
        if matrix.columns > COLUMNS_LIMIT:
            raise ConfigError(f"{matrix.columns} columns are beyond 16 bits; expected at most {COLUMNS_LIMIT}")
        numbers = (matrix.positions % matrix.columns).numpy().astype(np.uint16)
        self._indices = padded(torch.from_numpy(numbers.view(np.int16)))
        wide = 1 if self.tokens == 1 else 4 if self.tokens <= 4 else 8
        lanes = min(wide, target.lanes)
        vectors = wide // lanes
        compiled = kernel(
            ProductSpecification(
                target=target,
                lanes=lanes,
                vectors=vectors,
                chains=chains(vectors),
                index="column16",
                value=value,
                scaled=self._scales is not None,
                bias=self._bias is not None,
                activation=activation,
            )
        )
        return partial(self._run_columns, compiled, wide)

    def _run_columns(self, compiled: Kernel, wide: int, x: Tensor, pool: Pool | None) -> Tensor:
        """Lanes over tokens: x and y lie features by tokens, with tokens that are not there filled with zeros."""
        matrix = self.matrix
        if wide == 1:
            across, out = x, torch.empty(1, matrix.rows)
        else:
            across = torch.zeros(matrix.columns, wide)
            across[:, : self.tokens] = x.t()
            out = torch.empty(matrix.rows, wide)
        table = (ctypes.c_int64 * len(Argument))()
        table[Argument.BLOCKS] = 1
        table[Argument.ROWS] = matrix.rows
        table[Argument.ROW_POINTERS] = matrix.row_pointers.data_ptr()
        table[Argument.INDICES] = self._indices.data_ptr()
        table[Argument.VALUES] = self._values.data_ptr()
        table[Argument.INPUT] = across.data_ptr()
        table[Argument.OUTPUT] = out.data_ptr()
        table[Argument.OUTPUT_PITCH] = 4 * wide
        table[Argument.BIAS] = self._bias.data_ptr() if self._bias is not None else 0
        table[Argument.SCALES] = self._scales.data_ptr() if self._scales is not None else 0
        self._launch(compiled, ctypes.addressof(table), pool)
        return out if wide == 1 else out[:, : self.tokens].t().contiguous()

    def _make_bitmask(
        self, target: Target, value: ValueFormat, activation: Activation | None
    ) -> Callable[[Tensor, Pool | None], Tensor]:
        matrix, lanes = self.matrix, 16 if target.lanes >= 16 else 8
        self._groups = -(-matrix.columns // lanes)
        kept = torch.zeros(matrix.rows, self._groups * lanes, dtype=torch.bool)
        flat = matrix.positions.long()
        kept[flat // matrix.columns, flat % matrix.columns] = True
        self._masks = padded(torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little")))
        compiled = kernel(
            BitmaskSpecification(
                target=target,
                lanes=lanes,
                tokens=self.tokens,
                value=value,
                scaled=self._scales is not None,
                bias=self._bias is not None,
                activation=activation,
            )
        )
        return partial(self._run_bitmask, compiled)

    def _run_bitmask(self, compiled: Kernel, x: Tensor, pool: Pool | None) -> Tensor:
        matrix = self.matrix
        out = torch.empty(self.tokens, matrix.rows)
        table = (ctypes.c_int64 * len(BitmaskArgument))()
        table[BitmaskArgument.GROUPS] = self._groups
        table[BitmaskArgument.ROW_POINTERS] = matrix.row_pointers.data_ptr()
        table[BitmaskArgument.MASKS] = self._masks.data_ptr()
        table[BitmaskArgument.VALUES] = self._values.data_ptr()
        table[BitmaskArgument.INPUT] = x.data_ptr()
        table[BitmaskArgument.INPUT_PITCH] = 4 * matrix.columns
        table[BitmaskArgument.OUTPUT] = out.data_ptr()
        table[BitmaskArgument.OUTPUT_PITCH] = 4 * matrix.rows
        table[BitmaskArgument.BIAS] = self._bias.data_ptr() if self._bias is not None else 0
        table[BitmaskArgument.SCALES] = self._scales.data_ptr() if self._scales is not None else 0
        self._launch(compiled, ctypes.addressof(table), pool)
        return out

    def _launch(self, compiled: Kernel, table: int, pool: Pool | None) -> None:
        """Run a kernel to its end, rows cut for threads; the caller keeps the table alive."""
        threads = pool.threads if pool and worth_threads(self.matrix, self.tokens) else 1
        ranges = self.matrix.row_ranges(2 * threads) if threads > 1 else [(0, self.matrix.rows)]
        pieces: list[Piece] = [partial(compiled.call, table, 0, 1, begin, end) for begin, end in ranges]
        run_pieces(pieces, pool)
