"""Masks that keep n in every row and in every column of a square block.

Blocks of up to 4 x 4 have few such masks, 90 for 2:4; all are tried, so the best one is found. Larger blocks are filled
greedily, the largest score first. Rows and columns that are left short are completed by exchanges: where row r and
column c are short, some taken (i, j) gives way to (r, j) and (i, c), and the best such one is made. One always exists.
At least m - n + 1 columns are free in row r. Each of them is full, for greedy filling would have taken the crossing of
a short row with a short column; as many rows are free in column c, and full. If none of their crossings were taken,
such a row had its n weights in at most n - 1 columns. Row i and column j stay full, so that this holds until all are.
At last pairs of rows exchange columns as long as the sum grows.
"""

import itertools

import torch
from torch import Tensor

from sparsetwin.grouped_selection._layout import LARGEST, pieces

SWEEPS = 16  # over all pairs of rows; commonly three or four are enough
_ENUMERATED = 4  # blocks of up to this many rows are solved by trying all


def keep_best_transposable_(mask: Tensor, scores: Tensor, n: int) -> None:
    """Keep ``n`` in every row and column of each block, so that the sum of kept scores is large.

    Args:
        mask: (first axis, ..., m, m), bool, a view; is overwritten.
        scores: Of the same shape, any float dtype, without NaN.
        n: How many are kept, 0 < n < m.
    """
    m = scores.shape[-1]
    choose = best_blocks if m <= _ENUMERATED else good_blocks
    for kept, ranked in pieces(mask, scores):
        blocks = ranked.double().clamp(-LARGEST, LARGEST).reshape(-1, m, m)
        kept.copy_(choose(blocks, n).reshape(kept.shape))


def best_blocks(blocks: Tensor, n: int) -> Tensor:
    """Return the mask of the largest sum; of equal ones that which keeps the earlier weights, row by row.

    Args:
        blocks: (blocks, m, m), float64, finite.
        n: How many are kept in each row and column.
    """
    m = blocks.shape[-1]
    rows = list(itertools.combinations(range(m), n))
    sums = [[sum(blocks[:, row, column] for column in columns) for columns in rows] for row in range(m)]
    best = torch.full((len(blocks),), -torch.inf, dtype=blocks.dtype, device=blocks.device)
    found = torch.zeros(len(blocks), dtype=torch.int64, device=blocks.device)
    masks: list[list[list[bool]]] = []
    for choice in itertools.product(range(len(rows)), repeat=m):
        columns = [column for row in choice for column in rows[row]]
        if any(columns.count(column) != n for column in range(m)):
            continue
        total = sum(sums[row][chosen] for row, chosen in enumerate(choice))
        assert isinstance(total, Tensor)
        found.masked_fill_(total > best, len(masks))
        best = torch.maximum(best, total)
        masks.append([[column in rows[row] for column in range(m)] for row in choice])
    return torch.tensor(masks, device=blocks.device)[found]


def good_blocks(blocks: Tensor, n: int) -> Tensor:
    """Return masks filled greedily, completed and improved; of equal scores and gains the earliest is taken.

    Args:
        blocks: (blocks, m, m), float64, finite.
        n: How many are kept in each row and column.
    """
    taken = _fill(blocks, n)
    _complete_(taken, blocks, n)
    _improve_(taken, blocks)
    return taken


def _fill(blocks: Tensor, n: int) -> Tensor:
    """Take the largest scores first wherever row and column still have room."""
    count, m, _ = blocks.shape
    order = (blocks + 0.0).reshape(count, m * m).sort(dim=-1, descending=True, stable=True).indices.t().contiguous()
    every = torch.arange(count, device=blocks.device)
    taken = torch.zeros(count, m * m, dtype=torch.bool, device=blocks.device)
    rows = torch.full((count * m,), n, dtype=torch.int16, device=blocks.device)  # room that is left
    columns = rows.clone()
    for cell in order:
        row, column = every * m + cell // m, every * m + cell % m
        free = (rows[row] > 0) & (columns[column] > 0)
        taken[every, cell] = free
        rows[row] -= free.to(rows.dtype)
        columns[column] -= free.to(rows.dtype)
    return taken.reshape(blocks.shape)


def _complete_(taken: Tensor, blocks: Tensor, n: int) -> None:
    """Bring every row and column to ``n``, one weight a round in each block that is short."""
    while True:
        short = (taken.sum(dim=2) < n).any(dim=1).nonzero().reshape(-1)
        if not len(short):
            return
        held, scores = taken[short], blocks[short]
        every = torch.arange(len(short), device=blocks.device)
        row = (held.sum(dim=2) < n).byte().argmax(dim=1)
        column = (held.sum(dim=1) < n).byte().argmax(dim=1)
        ways = held & ~held[every, row][:, None, :] & ~held[every, :, column][:, :, None]
        gain = scores[every, row][:, None, :] + scores[every, :, column][:, :, None] - scores
        place = gain.masked_fill(~ways, -torch.inf).flatten(1).argmax(dim=1)
        i, j = place // blocks.shape[-1], place % blocks.shape[-1]
        held[every, i, j] = False
        held[every, row, j] = True
        held[every, i, column] = True
        taken[short] = held


def _improve_(taken: Tensor, blocks: Tensor) -> None:
    """Let pairs of rows exchange one column each, the best exchange first, until no sum grows."""
    m = blocks.shape[-1]
    active = torch.arange(len(blocks), device=blocks.device)
    for _ in range(SWEEPS):
        held, scores = (tensor[active].permute(1, 2, 0).contiguous() for tensor in (taken, blocks))
        changed = torch.zeros(len(active), dtype=torch.bool, device=blocks.device)
        for i, k in itertools.combinations(range(m), 2):
            prefers = scores[i] - scores[k]  # what row i has of a column more than row k: (columns, blocks)
            losses = prefers.masked_fill(~held[i] | held[k], torch.inf)
            wins = prefers.masked_fill(held[i] | ~held[k], -torch.inf)
            better = (wins.amax(dim=0) > losses.amin(dim=0)).nonzero().reshape(-1)
            given, gained = losses[:, better].argmin(dim=0), wins[:, better].argmax(dim=0)
            held[i, given, better] = False
            held[k, given, better] = True
            held[i, gained, better] = True
            held[k, gained, better] = False
            changed[better] = True
        taken[active] = held.permute(2, 0, 1)
        active = active[changed]
        if not len(active):
            return
