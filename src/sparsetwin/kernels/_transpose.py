"""Transposition of matrices whose rows lie at any pitch: tokens by features to features by tokens and back."""

import ctypes

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import check_dense
from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._product import overlap
from sparsetwin.kernels._specification import element_format
from sparsetwin.kernels._target import Target, checked_target
from sparsetwin.kernels._transpose_ir import TransposeArgument, TransposeSpecification

_Table = ctypes.c_int64 * len(TransposeArgument)


class Transpose:
    """``out = x.t()``, copied; calls may run at once.

    Args:
        target: What to compile for, or its name; this machine's best by default.
        source: The dtype of x, float32 or float16.
        destination: The dtype of ``out``; numbers are rounded to it.

    Raises:
        ConfigError: If no kernel can be made here.
    """

    def __init__(
        self,
        target: Target | str | None = None,
        *,
        source: torch.dtype = torch.float32,
        destination: torch.dtype = torch.float32,
    ) -> None:
        self._dtypes = source, destination
        formats = element_format(source), element_format(destination)
        specification = TransposeSpecification(target=checked_target(target), source=formats[0], destination=formats[1])
        self._kernel: Kernel = kernel(specification)

    @torch.no_grad()
    def __call__(self, x: Tensor, *, out: Tensor) -> Tensor:
        """Copy.

        Args:
            x: (rows, columns), last stride 1.
            out: (columns, rows), last stride 1, apart from x.

        Returns:
            ``out``.

        Raises:
            ConfigError: If a tensor's shape, dtype or layout is another one.
        """
        check_dense(x, "x", self._dtypes[0])
        check_dense(out, "out", self._dtypes[1])
        if x.dim() != 2 or out.shape != (x.shape[1], x.shape[0]):
            raise ConfigError(f"x has shape {tuple(x.shape)}, out {tuple(out.shape)}; expected (M, N) and (N, M)")
        for name, tensor in (("x", x), ("out", out)):
            contiguous = tensor.shape[1] <= 1 or tensor.stride(1) == 1
            if not contiguous or (tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]):
                raise ConfigError(f"{name} has strides {tensor.stride()}; expected rows of contiguous columns")
        if overlap(x, out):
            raise ConfigError("out shares memory with x")
        pitches = x.itemsize * x.stride(0), out.itemsize * out.stride(0)
        table = _Table(x.data_ptr(), pitches[0], out.data_ptr(), pitches[1], x.shape[1])
        self._kernel.call(ctypes.addressof(table), 0, x.shape[0], 0, 0)
        return out
