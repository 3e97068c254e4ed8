"""How alike two models answer, such as the halves of a pair."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetwin.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Means over samples."""

    samples: int
    same_top1: float  # share of samples with the same most likely class, from 0 to 1
    kl_divergence: float  # mean Kullback-Leibler divergence of the second model from the first, in nats


@torch.no_grad()
def compare_logits(first: Tensor, second: Tensor) -> Agreement:
    """Compare two models' outputs for the same samples.

    >>> compare_logits(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])).same_top1
    0.5

    Args:
        first: (..., classes), float, logits of the model that is the reference.
        second: Of the same shape, of the other model.

    Returns:
        Means over all leading axes, summed in float64; of equal logits the first class counts as most likely.

    Raises:
        ConfigError: If the shapes differ or hold no sample or class.

    Source: Peste et al., 2021, arXiv 2106.12379, the comparisons of sparse and dense models.
    """
    if first.shape != second.shape or not first.dim() or not first.numel():
        raise ConfigError(
            f"needs logits (..., classes) of the same samples, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    same = first.argmax(-1).eq(second.argmax(-1))
    expected, other = (F.log_softmax(logits.double(), dim=-1) for logits in (first, second))
    divergence = F.kl_div(other, expected, reduction="sum", log_target=True)
    return Agreement(
        samples=same.numel(),
        same_top1=same.double().mean().item(),
        kl_divergence=max(0.0, divergence.item() / same.numel()),  # rounding may leave -1e-17
    )
