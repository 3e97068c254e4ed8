"""What a weight is worth: functions from a tensor to scores of its shape, larger is kept."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsetwin.errors import ConfigError, nearest

Score = Callable[[Tensor], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """Return the absolute values of a weight.

    >>> magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])

    Args:
        weight: Any shape, any float dtype.

    Returns:
        Scores of the same shape, dtype and memory format.
    """
    weight = weight.detach()
    if type(weight) is not Tensor or weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return weight.abs()
    scores = torch.empty_like(weight)
    np.abs(weight.numpy(), out=scores.numpy())  # one thread: torch's threads wait for each other on a busy machine
    return scores


SCORES: dict[str, Score] = {"magnitude": magnitude}
"""Scores by the name under which a method's configuration holds them."""


def score_named(name: str) -> Score:
    """Return a score function by name.

    Raises:
        ConfigError: If no score has that name.
    """
    if name not in SCORES:
        raise ConfigError(f"unknown score {name!r}; known: {', '.join(SCORES)}{nearest(name, SCORES)}")
    return SCORES[name]
