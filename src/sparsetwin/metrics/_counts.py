"""Counting elements, of sharded tensors too."""

import torch
from torch import Tensor


@torch.no_grad()
def count_nonzero(tensor: Tensor) -> int:
    """Return how many elements of the whole tensor are not zero; True counts, and so does NaN.

    Args:
        tensor: Any shape and dtype; of a sharded tensor every process has to call this, and all get the same number.
    """
    count = tensor.ne(0).sum()
    gather = getattr(count, "full_tensor", None)  # a DTensor's own item() would count this process's shard only
    return int(count if gather is None else gather())
