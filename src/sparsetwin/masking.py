"""Masks and what is done with them. This file is the one owner of "set to zero".

A mask is a boolean tensor of its weight's shape and memory format; True keeps. `Masks` maps canonical parameter names
to masks and is empty in dense phases.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsetwin._compat import local, total
from sparsetwin.errors import StateError
from sparsetwin.schedules import Phase

Masks = dict[str, Tensor]


class SparseView(Protocol):
    """What others may see of a sparse training run; `Sparsifier` is one."""

    @property
    def phase(self) -> Phase | None:
        """The phase in force, or None before the first step."""

    @property
    def steps(self) -> int:
        """Optimizer steps done."""

    @property
    def masks(self) -> Masks:
        """The masks in force by canonical name; empty in dense phases."""

    @property
    def target_names(self) -> tuple[str, ...]:
        """Canonical names of all parameters that may be pruned, in the model's order."""


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def expand_bits(mask: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the mask as integers as wide as ``dtype``: all bits one where it keeps, zero where it prunes.

    Args:
        mask: Any shape, bool.
        dtype: The dtype of the weights that `keep_` is to mask, of 8, 16, 32 or 64 bits.

    Raises:
        StateError: If ``dtype`` has another width.
    """
    if dtype.itemsize not in _BITS:
        raise StateError(f"weights of dtype {dtype} cannot be masked; expected 8, 16, 32 or 64 bits")
    return mask.to(_BITS[dtype.itemsize]).neg_()


@torch.no_grad()
def keep_(tensor: Tensor, bits: Tensor) -> Tensor:
    """Set every pruned element to zero, in place.

    A bitwise and selects, as ``torch.where`` does (NaN, infinity and -0.0 become 0.0, which a multiplication would
    keep), and is as fast as a multiplication; ``masked_fill_`` with a boolean mask is several times slower on a CPU.

    Args:
        tensor: Any shape; its own process's part of a weight, gradient or optimizer state.
        bits: What `expand_bits` made of a mask of the same shape, for the same dtype.

    Raises:
        StateError: If the shape or the width of the elements differs.
    """
    if tensor.shape != bits.shape or tensor.itemsize != bits.itemsize:
        raise StateError(
            f"a tensor of shape {tuple(tensor.shape)} and {8 * tensor.itemsize} bits an element cannot be masked by "
            f"bits of shape {tuple(bits.shape)} and {8 * bits.itemsize}"
        )
    tensor.detach().view(bits.dtype).bitwise_and_(bits)
    return tensor


@torch.no_grad()
def apply_masks_(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Set the pruned elements of every named tensor to zero, in place; names without a mask are left alone.

    Args:
        tensors: Canonical name -> tensor of the mask's shape.
        masks: Canonical name -> bool.

    Raises:
        StateError: If a mask's tensor is missing or of another shape; then no tensor was changed.
    """
    _check_shapes(tensors, masks)
    for name, mask in masks.items():
        weight = local(tensors[name])
        keep_(weight, expand_bits(local(mask), dtype=weight.dtype))


def _check_shapes(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    for name, mask in masks.items():
        if name not in tensors or tensors[name].shape != mask.shape:
            found = f"shape {tuple(tensors[name].shape)}" if name in tensors else "none"
            raise StateError(f"the mask of {name} has shape {tuple(mask.shape)}, its tensor: {found}")


def count_kept(masks: Masks) -> int:
    """Return how many weights the masks keep in all, of sharded masks in all processes together."""
    return sum(total(mask.count_nonzero()) for mask in masks.values())


@torch.no_grad()
def count_pruned_nonzero(tensors: Mapping[str, Tensor], masks: Masks) -> dict[str, int]:
    """Return, for every name where it is not zero, how many elements are non-zero although their mask prunes them.

    NaN is not zero, -0.0 is. Of sharded tensors it counts the part of this process.

    Raises:
        StateError: If a mask's tensor is missing or of another shape.
    """
    _check_shapes(tensors, masks)
    counts = {name: int((local(tensors[name]).ne(0) & ~local(mask)).count_nonzero()) for name, mask in masks.items()}
    return {name: count for name, count in counts.items() if count}


def pack_mask(mask: Tensor) -> Tensor:
    """Return a mask as one bit a weight: uint8, (ceil(numel / 8),), row-major, the lowest bit first.

    >>> unpack_mask(pack_mask(torch.tensor([[True, False, True]])), shape=(1, 3))
    tensor([[ True, False,  True]])
    """
    flat = mask.detach().cpu().reshape(-1).numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def unpack_mask(packed: Tensor, *, shape: Iterable[int]) -> Tensor:
    """Return the bool mask of ``shape`` that `pack_mask` packed.

    Raises:
        StateError: If the packed mask is not uint8, has not exactly the bytes of that shape, or bits set beyond it.
    """
    size = tuple(shape)
    numel = int(np.prod(size, dtype=np.int64))
    if packed.dtype != torch.uint8:
        raise StateError(f"a packed mask is of dtype torch.uint8, got {packed.dtype}")
    if packed.numel() != (numel + 7) // 8:
        raise StateError(f"a packed mask of shape {size} has {(numel + 7) // 8} bytes, got {packed.numel()}")
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if bits[numel:].any():
        raise StateError(f"a packed mask of shape {size} has bits beyond its {numel} elements")
    return torch.from_numpy(bits[:numel].view(np.bool_)).reshape(size)
