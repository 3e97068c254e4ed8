"""Where the groups of a pattern lie: views of a weight whose last axes are the members of one group."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsetwin.patterns import NM, Block, Channel

Grouped = NM | Block | Channel
"""A pattern in which weights live and die together."""

LARGEST = 1e300
"""Scores beyond it, infinite ones among them, count as it where scores are added, so that sums are finite."""

_PIECE = 1 << 18  # weights worked on at a time: what lies in a core's cache
_DEVICE_PIECE = 1 << 25  # the same on an accelerator, where the launch of a kernel counts


def tiles(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """View a weight as blocks of outputs by input channels, one for every tap of a kernel.

    Args:
        tensor: (outputs, inputs, kernel ...), any strides; a vector is a matrix of one column.
        rows: Outputs of a block; they divide the outputs.
        columns: Inputs of a block; they divide the inputs.

    Returns:
        (outputs / rows, kernel ..., inputs / columns, rows, columns), a view.
    """
    matrix = tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor.movedim(1, -1)
    outputs, *taps, inputs = matrix.shape
    split = matrix.view(outputs // rows, rows, *taps, inputs // columns, columns)
    return split.movedim(1, -2)


def groups(tensor: Tensor, pattern: Grouped) -> Tensor:
    """View a weight as (first group axis, ...), with the members of a group on the last axes.

    Returns:
        `tiles` of N:M and of blocks; of channels (channels, all other axes).
    """
    return tensor.movedim(pattern.axis, 0) if isinstance(pattern, Channel) else tiles(tensor, *pattern.tile)


def pieces(*views: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut views of equal shape alike along the first axis, so that what is worked on fits a cache."""
    length = _PIECE if views[0].device.type == "cpu" else _DEVICE_PIECE
    rows = max(1, length // max(1, views[0][:1].numel()))
    for start in range(0, len(views[0]), rows):
        yield tuple(view[start : start + rows] for view in views)


def empty_mask(weight: Tensor) -> Tensor:
    """Return a mask that prunes everything, of the weight's shape, device and memory format."""
    return torch.zeros_like(weight, dtype=torch.bool, requires_grad=False)
