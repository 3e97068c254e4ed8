"""The inverse of one layer's empirical Fisher matrix, in blocks along its diagonal."""

from typing import Literal

import torch
from torch import Tensor

from sparsetwin.errors import SelectionError

Repair = Literal["joint", "summed", "none"]
"""How the weights that stay make up for those that are pruned."""

_CHUNK_ELEMENTS = 1 << 22  # of the blocks that are solved at once


class InverseFisher:
    """Blocks of ``(damping * I + mean of g g^T)^-1``, brought up to date by one gradient after the other.

    It holds a square of ``block_size`` for every block: as many numbers as the layer has weights, times
    ``block_size``, in the weight's own precision or fp32. The last block may be smaller; it is held at full size.

    >>> inverse = InverseFisher(torch.zeros(3), samples=1, block_size=2, damping=0.5)
    >>> inverse.add_(torch.tensor([1.0, 1.0, 0.0]))
    >>> inverse.blocks[0]
    tensor([[ 1.2000, -0.8000],
            [-0.8000,  1.2000]])

    Args:
        weight: Gives size, device and precision.
        samples: Gradients that will be added.
        block_size: Neighbouring weights, in row-major order, whose interactions are held.
        damping: Added to the Fisher matrix's diagonal.

    Source: Singh & Alistarh, 2020, arXiv 2004.14340, section 3, and its published code.
    """

    def __init__(self, weight: Tensor, *, samples: int, block_size: int, damping: float) -> None:
        self._size, self._samples = weight.numel(), samples
        self._width = min(block_size, self._size)
        count = -(-self._size // self._width)
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self.blocks = torch.zeros(count, self._width, self._width, dtype=dtype, device=weight.device)
        self.blocks.diagonal(dim1=1, dim2=2).fill_(1 / damping)

    def add_(self, gradient: Tensor) -> None:
        """Bring the inverse up to date by one gradient: the Sherman-Morrison formula in every block.

        Args:
            gradient: Of the weight's shape.
        """
        g = self._in_blocks(gradient).mT
        product = g @ self.blocks  # the blocks are symmetric, and rows are several times faster on a CPU
        scaled = product / (g * product).sum(2, keepdim=True).add_(self._samples).sqrt_()
        self.blocks.addcmul_(scaled.mT, scaled, value=-1)

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the inverse, (weights,)."""
        return self.blocks.diagonal(dim1=1, dim2=2).reshape(-1)[: self._size]

    def check(self, name: str) -> None:
        """Refuse an inverse that has lost its precision.

        Raises:
            SelectionError: If its diagonal is not positive throughout.
        """
        if not bool(((self.diagonal > 0) & self.diagonal.isfinite()).all()):
            raise SelectionError(
                f"the inverse Fisher matrix of {name} is not positive: its gradients are not finite, or so large that "
                "the damping is lost in rounding; give a larger damping"
            )

    def saliency(self, weight: Tensor) -> Tensor:
        """Return ``w ** 2 / (2 * [F^-1]_qq)`` for each weight q: how much the loss grows if it alone is removed.

        Args:
            weight: The layer's weight.

        Returns:
            Scores of its shape.
        """
        flat = weight.detach().reshape(-1).to(self.blocks.dtype)
        return (flat.square() / (2 * self.diagonal)).reshape(weight.shape)

    def change(self, weight: Tensor, pruned: Tensor, *, repair: Repair) -> Tensor:
        """Return what to add to a weight when some of it is pruned.

        Args:
            weight: The layer's weight.
            pruned: Bool of its shape, True for what goes; every other weight may change.
            repair: ``"joint"`` solves for all pruned weights of a block together; ``"summed"`` adds up what would
                make up for each of them alone; ``"none"`` removes them only.

        Returns:
            Of the weight's shape and dtype. With ``"summed"`` it leaves pruned weights somewhere near zero.

        Raises:
            SelectionError: If the inverse has lost its precision.
        """
        w, q = self._in_blocks(weight.detach()), self._in_blocks(pruned) > 0
        removed = torch.where(q, w, 0)
        if repair == "none":
            return self._like(-removed, weight)
        if repair == "summed":
            return self._like(-(self.blocks @ (removed / self.blocks.diagonal(dim1=1, dim2=2).unsqueeze(2))), weight)
        step = max(1, _CHUNK_ELEMENTS // self._width**2)
        chunks = zip(*(torch.split(tensor, step) for tensor in (self.blocks, q, removed)), strict=True)
        return self._like(torch.cat([_joint_change(*chunk) for chunk in chunks]), weight)

    def _in_blocks(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (blocks, block_size, 1), with zeros behind its end."""
        flat = tensor.reshape(-1).to(self.blocks.dtype)
        missing = self.blocks.shape[0] * self._width - self._size
        flat = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
        return flat.reshape(-1, self._width, 1)

    def _like(self, change: Tensor, weight: Tensor) -> Tensor:
        return change.reshape(-1)[: self._size].reshape(weight.shape).to(weight.dtype)


def _joint_change(inverse: Tensor, pruned: Tensor, removed: Tensor) -> Tensor:
    """Return ``-F^-1[:, Q] (F^-1[Q, Q])^-1 w[Q]`` of some blocks, as (blocks, block_size, 1).

    Rows and columns outside Q are those of the identity, so that blocks with any number of pruned weights are solved
    at once.
    """
    identity = torch.eye(inverse.shape[1], dtype=inverse.dtype, device=inverse.device)
    factor, failed = torch.linalg.cholesky_ex(torch.where(pruned & pruned.mT, inverse, identity))
    if bool(failed.any()):
        raise SelectionError(
            "the inverse Fisher matrix has lost its precision in rounding, so that the weights that stay cannot make "
            "up for the pruned ones; give a larger damping"
        )
    change = -(inverse @ torch.cholesky_solve(removed, factor))
    return torch.where(pruned, -removed, change)  # exactly so, without rounding
