"""What one call of one module costs, and what attention costs."""

from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
WEIGHTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


def call_flops(module: nn.Module, given: Any, made: Any) -> tuple[int, int] | None:
    """Return what a call costs for each non-zero weight, and what besides; None for a module that is not counted.

    Args:
        module: The module that was called.
        given: Its first argument, (1, ...).
        made: What it returned, (1, ...).

    Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
    """
    if isinstance(made, tuple):  # a max pool that returns indices too
        made = made[0]
    if not (isinstance(given, Tensor) and isinstance(made, Tensor)):
        return None
    if isinstance(module, nn.Linear):
        tokens = made.shape[:-1].numel()
        return 2 * tokens, 0 if module.bias is None else made.numel()
    if isinstance(module, WEIGHTED):
        source = given if isinstance(module, _TRANSPOSED) else made  # each weight is used once at each of its positions
        return 2 * source.shape[2:].numel(), 0 if module.bias is None else made.numel()
    if isinstance(module, _BATCH_NORMS):
        return 0, 2 * given.numel()
    if isinstance(module, nn.ReLU):
        return 0, made.numel()
    if isinstance(module, _POOLS):
        return 0, _window(module.kernel_size, axes=made.dim() - 2) * made.numel()
    if isinstance(module, _ADAPTIVE_POOLS):
        windows = (_adaptive_window(*sizes) for sizes in zip(given.shape[2:], made.shape[2:], strict=True))
        return 0, prod(windows) * made.shape[1]
    return None


def _window(kernel_size: int | tuple[int, ...], *, axes: int) -> int:
    """Return the elements of a pooling window."""
    return prod(kernel_size) if isinstance(kernel_size, tuple) else kernel_size**axes


def _adaptive_window(given: int, made: int) -> int:
    """Return the summed length of an adaptive pool's windows along one axis; they overlap if it does not divide."""
    return sum(-(-(index + 1) * given // made) - index * given // made for index in range(made))


class AttentionCounter(TorchFunctionMode):
    """Counts the two matrix products of every ``scaled_dot_product_attention`` while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and add its FLOPs if it is attention."""
        made = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            keys = given["key"].shape[-2]
            self.flops += 2 * keys * (given["query"].numel() + made.numel())
        return made
