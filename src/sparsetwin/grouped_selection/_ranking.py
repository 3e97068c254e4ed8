"""Whole blocks or channels, as many as come nearest to a budget."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetwin.distributions import Budget
from sparsetwin.grouped_selection._budgets import group_size, least_groups
from sparsetwin.grouped_selection._layout import LARGEST, empty_mask, groups, pieces
from sparsetwin.patterns import Block, Channel

_Floats = NDArray[np.float64]
_Bools = NDArray[np.bool_]


def keep_best_groups(
    budget: Budget,
    weights: Mapping[str, Tensor],
    score: Callable[[str], Tensor],
    *,
    pattern: Block | Channel,
    minimum_kept: int,
) -> dict[str, Tensor]:
    """Keep the groups of the best mean score: those that each layer keeps in any case, and of the others the best.

    Args:
        budget: Layers that compete, and the number of weights to come nearest to.
        weights: Canonical name -> weight.
        score: Canonical name -> scores of its shape, without NaN.
        pattern: Which weights live and die together.
        minimum_kept: Weights that every layer keeps, rounded up to whole groups.

    Returns:
        Canonical name -> mask of the weight's shape.
    """
    means = {name: _means(score(name), pattern) for name in budget.names}
    sizes = {name: group_size(pattern, weights[name].shape) for name in budget.names}
    least = {name: least_groups(pattern, weights[name].shape, minimum_kept=minimum_kept) for name in budget.names}
    masks: dict[str, Tensor] = {}
    for name, keep in _choose(means, sizes, least, budget.kept).items():
        masks[name] = mask = empty_mask(weights[name])
        view = groups(mask, pattern)
        lead = view.shape[:1] if isinstance(pattern, Channel) else view.shape[:-2]
        kept = torch.from_numpy(keep).to(mask.device).reshape(lead)
        view.copy_(kept.reshape(*lead, *[1] * (view.ndim - len(lead))).expand_as(view))
    return masks


def _means(scores: Tensor, pattern: Block | Channel) -> _Floats:
    """Return the mean score of each group, (groups,), float64, row-major over the axes of `groups`."""
    found: list[Tensor] = []
    lead = 1 if isinstance(pattern, Channel) else -2
    for (piece,) in pieces(groups(scores, pattern)):
        members = piece.flatten(lead).double().clamp(-LARGEST, LARGEST).reshape(-1, piece.shape[lead:].numel())
        found.append(_sum_pairwise(members) / members.shape[1])
    means: _Floats = torch.cat(found).cpu().numpy()
    return means


def _sum_pairwise(members: Tensor) -> Tensor:
    """Sum the last axis in an order that depends on its length alone, neither on the device nor on threads."""
    while (length := members.shape[-1]) > 1:
        half = length // 2
        halves = members[..., :half] + members[..., half : 2 * half]
        members = torch.cat([halves, members[..., 2 * half :]], dim=-1) if length % 2 else halves
    return members[..., 0]


def _choose(
    means: Mapping[str, _Floats], sizes: Mapping[str, int], least: Mapping[str, int], kept: int
) -> dict[str, _Bools]:
    """Return which groups of each layer are kept; ties go to the earlier layer, then to the lower index."""
    if not means:
        return {}
    order = np.argsort(-np.concatenate(list(means.values())), kind="stable")
    weights_of = np.repeat(list(sizes.values()), [len(layer) for layer in means.values()])
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    keep = np.zeros(order.size, dtype=bool)
    start = 0
    for name, layer in means.items():
        if least[name]:
            best = np.argpartition(rank[start : start + layer.size], least[name] - 1)[: least[name]]
            keep[start + best] = True
        start += layer.size
    others = order[~keep[order]]
    reached = np.concatenate([[0], np.cumsum(weights_of[others])]) + int(weights_of[keep].sum())
    keep[others[: int(np.abs(reached - kept).argmin())]] = True  # of two equally near the first, which is smaller
    bounds = np.cumsum([layer.size for layer in means.values()])[:-1]
    return dict(zip(means, np.split(keep, bounds), strict=True))
