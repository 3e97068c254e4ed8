"""The n best of every m neighbours."""

import torch
from torch import Tensor

from sparsetwin.grouped_selection._layout import pieces

_PAIRS = 16  # up to this many members each is compared with each; longer groups are sorted


def keep_best_(mask: Tensor, scores: Tensor, n: int) -> None:
    """Keep the ``n`` best along the last axis; of equal scores the earlier.

    Args:
        mask: (first axis, ..., m), bool, a view; is overwritten.
        scores: Of the same shape, any float dtype, without NaN.
        n: How many are kept, 0 < n < m.
    """
    choose = _by_pairs if scores.shape[-1] <= _PAIRS else _by_sorting
    for kept, ranked in pieces(mask, scores):
        choose(kept, ranked, n)


def _by_pairs(mask: Tensor, scores: Tensor, n: int) -> None:
    """Count for each member how many are better: those before it that are no worse, those after it that are."""
    columns = scores.movedim(-1, 0).contiguous()
    m = len(columns)
    better = torch.empty_like(columns, dtype=torch.uint8)
    for place in range(m):
        better[place] = m - 1 - place  # as if all after it were
    for first in range(m):
        for second in range(first + 1, m):
            wins = (columns[first] >= columns[second]).view(torch.uint8)
            better[first] -= wins
            better[second] += wins
    mask.movedim(-1, 0).copy_(better < n)


def _by_sorting(mask: Tensor, scores: Tensor, n: int) -> None:
    positive = scores + 0.0  # of -0.0 it makes 0.0, which a sort by bits would put above
    best = positive.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    mask.copy_(torch.zeros(mask.shape, dtype=torch.bool, device=mask.device).scatter_(-1, best, True))
