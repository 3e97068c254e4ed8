"""Does a mask have the N:M structure? A checker that shares nothing with what chooses masks."""

import torch
from torch import Tensor


@torch.no_grad()
def is_nm(mask: Tensor, n: int, m: int, *, transposable: bool = False, exact: bool = True) -> bool:
    """Whether a mask keeps ``n`` of every ``m`` neighbouring input channels, for each output and each tap.

    >>> is_nm(torch.tensor([[True, False, False, True]]), 2, 4)
    True
    >>> is_nm(torch.tensor([[True, False, False, False]]), 2, 4)
    False

    Args:
        mask: (outputs, inputs, kernel ...), bool, True keeps; ``weight != 0`` serves, too.
        n: Kept weights of a group.
        m: Length of a group.
        transposable: Whether it has to keep ``n`` of every ``m`` neighbouring outputs, too.
        exact: Whether fewer than ``n`` are refused; what multiplies such weights allows them.

    Returns:
        False, too, where ``m`` does not divide the channels.
    """
    if mask.ndim < 2:
        return False
    for axis in (1, 0) if transposable else (1,):
        if mask.shape[axis] % m:
            return False
        kept = mask.to(torch.bool).unfold(axis, m, m).sum(dim=-1)
        if not bool((kept == n).all() if exact else (kept <= n).all()):
            return False
    return True
