"""Transposition of float32 matrices whose rows lie at any pitch: tokens by features to features by tokens and back."""

import ctypes

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import check_float32
from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._product import overlap
from sparsetwin.kernels._target import Target, checked_target
from sparsetwin.kernels._transpose_ir import TransposeArgument, TransposeSpecification

_Table = ctypes.c_int64 * len(TransposeArgument)


class Transpose:
    """``out = x.t()``, copied; calls may run at once.

    Args:
        target: What to compile for, or its name; this machine's best by default.

    Raises:
        ConfigError: If no kernel can be made here.
    """

    def __init__(self, target: Target | str | None = None) -> None:
        self._kernel: Kernel = kernel(TransposeSpecification(target=checked_target(target)))

    @torch.no_grad()
    def __call__(self, x: Tensor, *, out: Tensor) -> Tensor:
        """Copy.

        Args:
            x: (rows, columns), float32, last stride 1.
            out: (columns, rows), float32, last stride 1, apart from x.

        Returns:
            ``out``.

        Raises:
            ConfigError: If a tensor's shape, dtype or layout is another one.
        """
        check_float32(x, "x")
        check_float32(out, "out")
        if x.dim() != 2 or out.shape != (x.shape[1], x.shape[0]):
            raise ConfigError(f"x has shape {tuple(x.shape)}, out {tuple(out.shape)}; expected (M, N) and (N, M)")
        for name, tensor in (("x", x), ("out", out)):
            contiguous = tensor.shape[1] <= 1 or tensor.stride(1) == 1
            if not contiguous or (tensor.shape[0] > 1 and tensor.stride(0) < tensor.shape[1]):
                raise ConfigError(f"{name} has strides {tensor.stride()}; expected rows of contiguous columns")
        if overlap(x, out):
            raise ConfigError("out shares memory with x")
        table = _Table(x.data_ptr(), 4 * x.stride(0), out.data_ptr(), 4 * out.stride(0), x.shape[1])
        self._kernel.call(ctypes.addressof(table), 0, x.shape[0], 0, 0)
        return out
