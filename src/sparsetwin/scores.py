"""What a weight is worth: functions from a tensor to scores of its shape, larger is kept."""

from collections.abc import Callable

from torch import Tensor

from sparsetwin.errors import ConfigError, nearest

Score = Callable[[Tensor], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """Return the absolute values of a weight.

    Args:
        weight: Any shape, any float dtype.

    Returns:
        Scores of the same shape, dtype and memory format.
    """
    return weight.detach().abs()


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
