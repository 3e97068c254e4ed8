"""One to eight tokens against a sparse matrix: few activations, so what counts is the bytes of the weights.

Two formats. ``columns``: a 16-bit column and a value for each kept weight, 6 bytes in float32 and 3 in int8; lanes over
the kept weights of a row for one token, over tokens for more. ``bitmask``: one bit for each weight and a value for each
kept one; lanes over columns, for targets that unpack values by a mask. Values in bfloat16 or float16 are rounded once,
when the product is made; sums are float32.
"""

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._bitmask_ir import BitmaskArgument, BitmaskSpecification
from sparsetwin.kernels._blocks import CSRBlocks, check_float32, padded
from sparsetwin.kernels._cache import Kernel, Specification, kernel
from sparsetwin.kernels._launch import chains, worth_threads
from sparsetwin.kernels._one_token_ir import OneTokenArgument, OneTokenSpecification
from sparsetwin.kernels._pool import Pool
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
        self._shape = (tokens, matrix.columns)
        self._wide = 0  # tokens that lie side by side, where lanes are over tokens
        self._bias = bias
        self._values = matrix.values
        if value in _ROUNDED and matrix.values.dtype == torch.float32:
            self._values = padded(matrix.values.to(_ROUNDED[value]))
        make = {"columns": self._make_columns, "bitmask": self._make_bitmask}.get(self.layout)
        if make is None:
            raise ConfigError(f"layout={layout!r}; expected 'columns' or 'bitmask'")
        self._kernel = make(chosen, value, activation)

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
        if x.shape != self._shape or not x.is_contiguous():
            found = f"x has shape {tuple(x.shape)}, strides {x.stride()}"
            raise ConfigError(f"{found}; expected contiguous {self._shape}")
        if not self._wide:
            out = torch.empty(self.tokens, self.matrix.rows, dtype=torch.float32, device="cpu")
            self._launch(x, out, pool)
            return out
        # lanes over tokens: those that are not there are zero
        across = torch.zeros(self.matrix.columns, self._wide, dtype=torch.float32, device="cpu")
        across[:, : self.tokens] = x.detach().t()
        out = torch.empty(self.matrix.rows, self._wide, dtype=torch.float32, device="cpu")
        self._launch(across, out, pool)
        return out[:, : self.tokens].t().contiguous()

    def _make_columns(self, target: Target, value: ValueFormat, activation: Activation | None) -> "_Ready":
        matrix = self.matrix
        if matrix.columns > COLUMNS_LIMIT:
            raise ConfigError(f"{matrix.columns} columns are beyond 16 bits; expected at most {COLUMNS_LIMIT}")
        numbers = (matrix.positions % matrix.columns).numpy().astype(np.uint16)
        self._indices = padded(torch.from_numpy(numbers.view(np.int16)))
        if self.tokens == 1:
            one = OneTokenSpecification(
                target=target,
                lanes=min(8, target.lanes),
                value=value,
                scaled=matrix.scales is not None,
                bias=self._bias is not None,
                activation=activation,
            )
            return self._ready(one, OneTokenArgument, COLUMNS=self._indices)
        self._wide = 4 if self.tokens <= 4 else 8
        lanes = min(self._wide, target.lanes)
        some = ProductSpecification(
            target=target,
            lanes=lanes,
            vectors=self._wide // lanes,
            chains=chains(self._wide // lanes),
            index="column16",
            value=value,
            scaled=matrix.scales is not None,
            bias=self._bias is not None,
            activation=activation,
        )
        return self._ready(
            some, Argument, INDICES=self._indices, BLOCKS=1, ROWS=matrix.rows, OUTPUT_PITCH=4 * self._wide
        )

    def _make_bitmask(self, target: Target, value: ValueFormat, activation: Activation | None) -> "_Ready":
        matrix, lanes = self.matrix, 16 if target.lanes >= 16 else 8
        groups = -(-matrix.columns // lanes)
        kept = torch.zeros(matrix.rows, groups * lanes, dtype=torch.bool, device="cpu")
        flat = matrix.positions.long()
        kept[flat // matrix.columns, flat % matrix.columns] = True
        self._masks = padded(torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little")))
        specification = BitmaskSpecification(
            target=target,
            lanes=lanes,
            tokens=self.tokens,
            value=value,
            scaled=matrix.scales is not None,
            bias=self._bias is not None,
            activation=activation,
        )
        pitches = {"INPUT_PITCH": 4 * matrix.columns, "OUTPUT_PITCH": 4 * matrix.rows}
        return self._ready(specification, BitmaskArgument, MASKS=self._masks, GROUPS=groups, **pitches)

    def _ready(self, specification: Specification, argument: type[IntEnum], **further: Tensor | int) -> "_Ready":
        given: dict[str, Tensor | int | None] = {
            "ROW_POINTERS": self.matrix.row_pointers,
            "VALUES": self._values,
            "BIAS": self._bias,
            "SCALES": self.matrix.scales,
            **further,
        }
        table = (ctypes.c_int64 * len(argument))()
        for name, found in given.items():
            if found is not None:
                table[argument[name]] = found if isinstance(found, int) else _address(found)
        return _Ready(kernel(specification), table, int(argument["INPUT"]), int(argument["OUTPUT"]))

    def _launch(self, x: Tensor, out: Tensor, pool: Pool | None) -> None:
        """Run the kernel to its end, rows cut for threads."""
        ready = self._kernel
        table = type(ready.table).from_buffer_copy(ready.table)  # calls may run at once
        table[ready.input], table[ready.output] = x.data_ptr(), out.data_ptr()
        call, address = ready.kernel.call, ctypes.addressof(table)
        if pool is None or not worth_threads(self.matrix, self.tokens):
            call(address, 0, 1, 0, self.matrix.rows)
            return
        ranges = self.matrix.row_ranges(2 * pool.threads)
        pool.run([partial(call, address, 0, 1, begin, end) for begin, end in ranges])


def _address(array: Tensor) -> int:
    """Return where an array begins; of an empty one, where its padding does, which torch gives as 0."""
    return int(array.untyped_storage().data_ptr() + array.storage_offset() * array.element_size())


@dataclass(frozen=True, eq=False)
class _Ready:
    """A kernel, and its table of arguments without the input and the output, which each call brings."""

    kernel: Kernel
    table: "ctypes.Array[ctypes.c_int64]"
    input: int  # where in the table
    output: int
