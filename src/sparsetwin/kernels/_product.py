"""Sparse matrix times dense activations, features by columns, as kernels want it."""

import math

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import CSRBlocks, check_dense, check_float32, density, packed
from sparsetwin.kernels._kept import KeptWeight
from sparsetwin.kernels._launch import Addresses, Epilogue, Tiling, default_vectors, tiled_product
from sparsetwin.kernels._pool import Pool
from sparsetwin.kernels._specification import ELEMENT_BYTES, LINE_BYTES, Activation, Element, element_format
from sparsetwin.kernels._target import Target, checked_target

_PANEL_BYTES = 32 * 1024  # of activations that one block of a matrix works on: a first-level cache
# weights that a row should have in a block: each row of a block costs a load and a store of its sums, which for float16
# are twice as wide, and converted
_ROW_WEIGHTS: dict[Element, int] = {"float32": 8, "float16": 32}


def padded_pitch(columns: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the pitch, in elements, at which rows of so many columns do not compete for the same cache lines.

    An odd number of lines; a power of two would map every row to the same few sets of the cache.

    >>> padded_pitch(128), padded_pitch(1)
    (144, 16)
    """
    line = LINE_BYTES // dtype.itemsize
    lines = -(-columns // line)
    return (lines | 1) * line


def empty_padded(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uninitialised activations, (rows, columns) float32, with the row pitch of `padded_pitch`."""
    return torch.empty(rows, padded_pitch(columns, dtype), dtype=dtype, device="cpu")[:, :columns]


def default_block(length: int, *, kept: float, lines: int, target: Target, element: Element = "float32") -> int:
    """Return how many columns (or channels) of a weight share a block when nothing was measured.

    As many as have their activations in the cache, but enough for a row to have some weights in each block.

    Args:
        length: Columns or channels in all.
        kept: Average number of kept weights that a row has in one of them.
        lines: Vectors that one of them takes in the cache.
        target: What is compiled for.
        element: Of the activations.
    """
    fitting = max(_PANEL_BYTES / (lines * target.lanes * 4), _ROW_WEIGHTS[element] / max(kept, 1e-9), 1)
    blocks = math.ceil(length / fitting)
    return -(-length // blocks)


def product_block(weight: KeptWeight | Tensor, vectors: int, target: Target, element: Element = "float32") -> int:
    """Return the `default_block` of a matrix with zeros, for tiles of so many vectors."""
    shape = tuple(weight.shape)
    if len(shape) < 2 or 0 in shape:
        raise ConfigError(f"a weight of shape {shape} has no kernel; expected (M, K)")
    return default_block(math.prod(shape[1:]), kept=density(weight), lines=vectors, target=target, element=element)


class SparseProduct:
    """``y = activation(W x + bias + residual)`` for a sparse W and dense x, features by columns.

    Each column's result is a sum over the kept weights only, in an order that depends neither on the number of
    threads nor on the values: what lies at pruned weights is never multiplied, so that a NaN or an infinity there does
    not reach the result, as it would through a dense product with zeros. Calls may run at once.

    In float16, weights are rounded to it and so are results. Sums of a few products are float16, sums of these
    float32. What is too large for it becomes an infinity or NaN.

    Args:
        weight: The weights; `CSRBlocks`, whose values may be refreshed between calls, a `KeptWeight`, or a dense
            matrix (M, K).
        columns: Of the activations: tokens or pixels.
        pitch: Elements from row to row of the input; `padded_pitch` of the columns by default.
        bias: (M,), float32.
        activation: Fused at the store.
        residual: Whether each call brings a residual.
        tiling: How the product is cut; chosen by the sizes by default. `CSRBlocks` bring their own block.
        dtype: Of the activations; float16 needs a target that computes with it (``Target.halves``).

    Raises:
        ConfigError: If something does not fit, or no kernel can be made here.
    """

    def __init__(
        self,
        weight: CSRBlocks | KeptWeight | Tensor,
        *,
        columns: int,
        pitch: int | None = None,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        residual: bool = False,
        tiling: Tiling | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        tiling = tiling or Tiling()
        element = element_format(dtype)
        chosen = checked_target(tiling.target)
        if not isinstance(weight, CSRBlocks):
            width = tiling.vectors or default_vectors(columns, chosen, element)
            block = tiling.block or product_block(weight, width, chosen, element)
            weight = packed(weight, block, narrow=tiling.narrow)
        if bias is not None:
            check_float32(bias, "the bias")
            bias = bias.detach().contiguous()
        self.matrix = weight
        self.columns = columns
        self.dtype = dtype
        self.pitch = padded_pitch(columns, dtype) if pitch is None else pitch
        if self.pitch < columns:
            raise ConfigError(f"a pitch of {self.pitch} elements is less than the {columns} columns")
        self._residual = residual
        starts = torch.arange(weight.columns, dtype=torch.int64, device="cpu") * self.pitch * ELEMENT_BYTES[element]
        indices = weight.offsets(starts)
        epilogue = Epilogue(bias=bias, residual=residual, activation=activation)
        self._product = tiled_product(
            weight if element == "float32" else weight.in_half(),
            indices,
            columns=columns,
            target=chosen,
            vectors=tiling.vectors,
            epilogue=epilogue,
            element=element,
        )

    @torch.no_grad()
    def __call__(
        self, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None, pool: Pool | None = None
    ) -> Tensor:
        """Multiply.

        Args:
            x: (K, columns), of the dtype, strides (pitch, 1): other layouts are refused, `pad` copies them.
            residual: (M, columns), of the dtype, last stride 1; given exactly if the product was made for one.
            out: (M, columns), of the dtype, last stride 1, apart from the inputs; new and padded by default.
            pool: Threads; the caller's alone by default.

        Returns:
            ``out``.

        Raises:
            ConfigError: If a tensor's shape, dtype or layout is another one.
        """
        rows, dtype, size = self.matrix.rows, self.dtype, self.dtype.itemsize
        _check(x, "x", (self.matrix.columns, self.columns), dtype)
        if x.shape[0] > 1 and x.stride(0) != self.pitch:
            raise ConfigError(f"x has a row pitch of {x.stride(0)} elements; this product was made for {self.pitch}")
        if (residual is not None) != self._residual:
            raise ConfigError(f"residual={'given' if residual is not None else None}; made with {self._residual}")
        out = empty_padded(rows, self.columns, dtype) if out is None else out
        _check(out, "out", (rows, self.columns), dtype)
        if residual is not None:
            _check(residual, "residual", (rows, self.columns), dtype)
        for other in (x, residual):
            if other is not None and overlap(out, other):
                raise ConfigError(
                    "out shares memory with an input; partial sums in it would overwrite what is still read"
                )
        at = Addresses(
            input=x.data_ptr(),
            output=out.data_ptr(),
            output_pitch=size * out.stride(0),
            residual=residual.data_ptr() if residual is not None else 0,
            residual_pitch=size * residual.stride(0) if residual is not None else 0,
        )
        self._product.run(at, pool)
        return out

    @torch.no_grad()
    def pad(self, x: Tensor) -> Tensor:
        """Copy any (K, columns) tensor into the layout and dtype that a call takes."""
        padded = torch.empty(self.matrix.columns, self.pitch, dtype=self.dtype, device="cpu")[:, : self.columns]
        return padded.copy_(x)


def _check(tensor: Tensor, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_dense(tensor, name, dtype)
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if (shape[1] > 1 and tensor.stride(1) != 1) or (shape[0] > 1 and tensor.stride(0) < shape[1]):
        raise ConfigError(f"{name} has strides {tensor.stride()}; expected rows of contiguous columns: copy it first")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors may share memory."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    ends = [
        (
            t.data_ptr(),
            t.data_ptr() + t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))),
        )
        for t in (a, b)
    ]
    return ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]
