"""The int8 grid of a weight: a scale for each channel, symmetric about zero; files and training share it to the bit."""

import torch
from torch import Tensor

_STEPS = 127  # of an int8 on either side of zero; -128 is not used, so that rounding is symmetric


def channel_scales(weight: Tensor) -> Tensor:
    """Return a weight's scales: the largest absolute value of each slice along the first axis over 127.

    Args:
        weight: Any shape, floating point; pruned elements are zero.

    Returns:
        float32, on the weight's device, of the weight's number of axes: the length of all but the first is 1.
    """
    axes = tuple(range(1, weight.ndim))
    if weight.numel() == 0:
        return weight.new_zeros([*weight.shape[:1], *(1 for _ in axes)], dtype=torch.float32)
    sizes = weight.detach().abs()
    largest = sizes.amax(axes, keepdim=True) if axes else sizes
    return (largest.double() / _STEPS).float()


def whole_steps(values: Tensor, scales: Tensor) -> Tensor:
    """Return values as whole multiples of their scales, ties to even.

    Args:
        values: Any shape, floating point.
        scales: float32, of a shape that broadcasts to the values'.

    Returns:
        int8, from -127 to 127; 0 in a channel of zeros.
    """
    steps = values.detach().double() / scales.double()
    steps.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # a channel of zeros, or so small that its scale is zero
    return steps.round_().clamp_(-_STEPS, _STEPS).to(torch.int8)


def widened(steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights from whole multiples: multiplied in float32, or in float64 for float64 weights.

    Args:
        steps: Any shape, int8.
        scales: float32, of a shape that broadcasts to the steps'.
        dtype: Of the weights.
    """
    product = torch.promote_types(dtype, torch.float32)
    return (steps.to(product) * scales.to(product)).to(dtype)


def on_grid(weight: Tensor) -> Tensor:
    """Return a weight rounded to int8 values and back, such that a second time, as by a file, changes no bit.

    A file takes its scales from the rounded values, so those are taken here. They are the weight's own scales except
    where a channel is so small that float32 holds its scale in a few bits.

    Args:
        weight: Any shape, floating point; pruned elements are zero, and stay so. Of a DTensor the local part.

    Returns:
        The weight's shape, dtype and memory format. A channel with NaN or infinity is all NaN.
    """
    if weight.numel() == 0:
        return weight.detach().clone()
    scales = channel_scales(weight)
    axes = tuple(range(1, weight.ndim))
    sizes = weight.detach().abs()
    ends = sizes.amax(axes, keepdim=True) if axes else sizes
    scales = channel_scales(widened(whole_steps(ends, scales), scales, weight.dtype))
    return widened(whole_steps(weight, scales), scales, weight.dtype)
