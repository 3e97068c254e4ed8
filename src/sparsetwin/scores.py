"""What a weight is worth: tensors to scores of the weight's shape, larger is kept.

A score that needs more than the weight says what: a number remembered for each weight and brought up to date at every
step, or the gradient of the step at which weights are ranked, or random draws.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetwin._compat import is_sharded, local
from sparsetwin.errors import ConfigError, nearest


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


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``|w * g|``: how much the loss changes, to first order, if a weight is removed.

    >>> sensitivity(torch.tensor([-2.0, 0.5]), torch.tensor([1.0, 3.0]))
    tensor([2.0000, 1.5000])

    Args:
        weight: Any shape.
        gradient: Of the loss with respect to it.

    Source: Lee, Ajanthan & Torr, 2019, arXiv 1810.02340, equation 4 (SNIP).
    """
    return (weight.detach() * gradient).abs()


def fisher_saliency(weight: Tensor, fisher: Tensor) -> Tensor:
    """Return ``w ** 2 * F / 2``: how much the loss grows, to second order and weight by weight, if it is removed.

    >>> fisher_saliency(torch.tensor([-2.0, 0.5]), torch.tensor([0.5, 4.0]))
    tensor([1.0000, 0.5000])

    Args:
        weight: Any shape.
        fisher: Diagonal of the empirical Fisher matrix, the mean square of gradients; of the weight's shape.

    Source: Theis et al., 2018, arXiv 1801.05787, equation 6; LeCun, Denker & Solla, 1990, for the saliency.
    """
    return weight.detach().square() * fisher / 2


def random_scores(weight: Tensor, *, seed: int) -> Tensor:
    """Return uniform draws in [0, 1), the same ones for a seed however the weight is sharded.

    Args:
        weight: Gives shape and device; may be a DTensor.
        seed: Of the draws.
    """
    draws = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    if not is_sharded(weight):
        return draws.to(weight.device)
    from sparsetwin._sharding import global_indices, like  # loads torch.distributed.tensor

    here = draws.reshape(-1)[global_indices(weight).cpu()]
    return like(weight, here.to(local(weight).device))


def add_movement_(memory: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Add ``-w * g`` to the memory: positive for a weight that updates move away from zero.

    Args:
        memory: Sum so far, changed in place; all three of the weight's shape.
        weight: Before the update.
        gradient: That the optimizer is given.

    Source: Sanh, Wolf & Rush, 2020, arXiv 2005.07683, equation 4.
    """
    memory.addcmul_(weight.detach(), gradient, value=-1)


def add_square_(memory: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Add ``g ** 2`` to the memory, whose mean over steps is the diagonal of the empirical Fisher matrix."""
    memory.addcmul_(gradient, gradient)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score, and what it needs.

    A score of your own is one entry in `SCORES`.
    """

    of: Callable[[Tensor, Tensor | None], Tensor]
    """From a weight, and what is remembered of it or its gradient, to its scores."""
    remember_: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """Brings what is remembered up to date in place, before each update: (memory, weight, gradient)."""
    needs_gradients: bool = False
    """Whether the second argument of ``of`` is the gradient, so that weights are ranked between backward and update."""
    draws: bool = False
    """Whether scores are drawn at random; ``of`` is not called then."""


def _with(evidence: Tensor | None) -> Tensor:
    assert evidence is not None
    return evidence


SCORES: dict[str, Score] = {
    "magnitude": Score(of=lambda weight, _: magnitude(weight)),
    "movement": Score(of=lambda _, moved: _with(moved), remember_=add_movement_),
    "sensitivity": Score(of=lambda weight, gradient: sensitivity(weight, _with(gradient)), needs_gradients=True),
    "fisher": Score(of=lambda weight, squares: fisher_saliency(weight, _with(squares)), remember_=add_square_),
    "random": Score(of=lambda weight, _: magnitude(weight), draws=True),
}
"""Scores by the name under which a method's configuration holds them."""


def score_named(name: str) -> Score:
    """Return a score by name.

    Raises:
        ConfigError: If no score has that name.
    """
    if name not in SCORES:
        raise ConfigError(f"unknown score {name!r}; known: {', '.join(SCORES)}{nearest(name, SCORES)}")
    return SCORES[name]
