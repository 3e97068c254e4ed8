"""Kept values in fewer bits: how they are rounded, and how they become weights again."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sparsetwin.errors import StateError

Values: TypeAlias = Literal["exact", "float32", "bfloat16", "float16", "int8"]
"""How kept values are stored: bit for bit, rounded to a narrower float, or as int8 with one scale a channel."""

VALUES: tuple[Values, ...] = get_args(Values)
_STORED: dict[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8
}  # fmt: skip
_STEPS = 127  # of an int8 on either side of zero; -128 is not used, so that rounding is symmetric


def narrowed(values: Values, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype that values of a tensor are rounded to, or None if they are stored as they are.

    Values are never widened: bfloat16 weights stay so if float32 is asked for.

    Raises:
        StateError: If ``values`` is none of `VALUES`.
    """
    if values not in VALUES:
        raise StateError(f"values can be stored as {', '.join(VALUES)}; got {values!r}")
    stored = _STORED.get(values)
    if stored is None or stored == dtype or stored.itemsize > dtype.itemsize:
        return None
    return stored


def channels(shape: tuple[int, ...]) -> int:
    """Return the number of scales of an int8 tensor: one for each index of its first axis."""
    return shape[0] if shape else 1


def channel_scales(tensor: Tensor) -> Tensor:
    """Return a weight's scales.

    Args:
        tensor: Any shape, floating point; pruned elements are zero.

    Returns:
        (channels,), float32: the largest absolute value of each slice along the first axis over 127.
    """
    rows = channels(tuple(tensor.shape))
    if tensor.numel() == 0:
        return torch.zeros(rows)
    largest = tensor.detach().reshape(rows, -1).abs().amax(1)
    return (largest.double() / _STEPS).float().cpu()


def round_values(kept: Tensor, dtype: torch.dtype, *, scales: Tensor | None, counts: Tensor) -> Tensor:
    """Return kept values rounded to the nearest that ``dtype`` can hold, ties to even.

    Args:
        kept: (kept,), floating point, row-major.
        dtype: As `narrowed` returned it.
        scales: (channels,), float32, for int8.
        counts: (channels,), int64: how many of the values belong to each channel.
    """
    if scales is None:
        return kept.to(dtype)
    steps = kept.double() / scales.double().repeat_interleave(counts)
    return steps.round().clamp(-_STEPS, _STEPS).nan_to_num(0.0).to(torch.int8)  # 0 / 0 in a channel of zeros


def widen(values: Tensor, dtype: torch.dtype, *, scales: Tensor | None, counts: Tensor) -> Tensor:
    """Return stored values in the weight's own dtype: `round_values` undone, up to the rounding.

    An int8 value is multiplied by its channel's scale in float32, or in float64 for float64 weights.
    """
    if scales is None:
        return values.to(dtype)
    product = torch.promote_types(dtype, torch.float32)
    return (values.to(product) * scales.to(product).repeat_interleave(counts)).to(dtype)


def check_fits(name: str, tensor: Tensor, values: Values) -> None:
    """Refuse a weight whose values the narrower form cannot hold.

    Raises:
        StateError: Naming it, if a finite value would become infinite, or int8 is to hold NaN or infinity.
    """
    dtype = narrowed(values, tensor.dtype)
    if dtype is None:
        return
    tensor = tensor.detach()
    finite = tensor.isfinite()
    if dtype is torch.int8:
        if not bool(finite.all()):
            raise StateError(f"{name} has values that are not finite, which int8 cannot hold; store them as 'exact'")
        largest = channel_scales(tensor).double() * _STEPS
        fits = bool(largest.to(torch.promote_types(tensor.dtype, torch.float32)).to(tensor.dtype).isfinite().all())
    else:
        fits = bool((tensor.to(dtype).isfinite() | ~finite).all())
    if not fits:
        most = float(tensor[finite].abs().max())
        wider = "bfloat16 or exact" if dtype is torch.float16 else "exact"
        raise StateError(f"{name} has values up to {most:.6g}, too large for {values}; store them as {wider}")
