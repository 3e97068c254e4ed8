"""Kept values in fewer bits: how they are rounded, and how they become weights again."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sparsetwin import _int8
from sparsetwin.errors import StateError

Values: TypeAlias = Literal["exact", "float32", "bfloat16", "float16", "int8"]
"""How kept values are stored: bit for bit, rounded to a narrower float, or as int8 with one scale a channel."""

VALUES: tuple[Values, ...] = get_args(Values)
_STORED: dict[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8
}  # fmt: skip


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
    """Return a weight's scales as a file holds them: (channels,), float32, on the CPU.

    Args:
        tensor: Any shape, floating point; pruned elements are zero.
    """
    return _int8.channel_scales(tensor).reshape(channels(tuple(tensor.shape))).cpu()


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
    return _int8.whole_steps(kept, scales.repeat_interleave(counts))


def widen(values: Tensor, dtype: torch.dtype, *, scales: Tensor | None, counts: Tensor) -> Tensor:
    """Return stored values in the weight's own dtype: `round_values` undone, up to the rounding.

    An int8 value is multiplied by its channel's scale in float32, or in float64 for float64 weights.
    """
    if scales is None:
        return values.to(dtype)
    return _int8.widened(values, scales.repeat_interleave(counts), dtype)


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
        scales = channel_scales(tensor)
        most_steps = torch.full_like(scales, 127, dtype=torch.int8)
        fits = bool(_int8.widened(most_steps, scales, tensor.dtype).isfinite().all())
    else:
        fits = bool((tensor.to(dtype).isfinite() | ~finite).all())
    if not fits:
        most = float(tensor[finite].abs().max())
        wider = "bfloat16 or exact" if dtype is torch.float16 else "exact"
        raise StateError(f"{name} has values up to {most:.6g}, too large for {values}; store them as {wider}")
