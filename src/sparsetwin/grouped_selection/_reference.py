"""The same masks weight by weight in plain Python: the twin that the fast selection is tested against."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparsetwin.distributions import Budget
from sparsetwin.grouped_selection._layout import LARGEST, Grouped
from sparsetwin.patterns import NM, Channel

_Place = tuple[int, ...]
_Group = list[_Place]
_Cells = list[list[float]]
_Chosen = set[tuple[int, int]]


def reference_grouped_masks(
    weights: Mapping[str, Tensor],
    score: Callable[[str], Tensor],
    budgets: Sequence[Budget],
    *,
    minimum_kept: int,
    pattern: Grouped,
) -> dict[str, Tensor]:
    """Do what `select_grouped_masks` does, slowly and for valid arguments alone."""
    masks = {name: torch.zeros(weights[name].shape, dtype=torch.bool) for budget in budgets for name in budget.names}
    for budget in budgets:
        scores = {name: score(name).double() for name in budget.names}
        groups = {name: _groups(weights[name].shape, pattern) for name in budget.names}
        if isinstance(pattern, NM):
            kept = {name: [_best(group, scores[name], pattern) for group in groups[name]] for name in groups}
        else:
            kept = _best_groups(groups, scores, budget.kept, minimum_kept)
        for name, chosen in kept.items():
            for place in itertools.chain.from_iterable(chosen):
                masks[name][place] = True
    return {name: masks[name] for name in weights if name in masks}


def _groups(shape: Sequence[int], pattern: Grouped) -> list[_Group]:
    """Return each group's places, row-major within it; groups run over outputs, taps, then inputs."""
    found: dict[_Place, _Group] = {}
    for place in itertools.product(*map(range, shape)):
        if isinstance(pattern, Channel):
            key: _Place = (place[pattern.axis],)
        else:
            output, column = (*place[:2], 0)[:2]
            key = (output // pattern.tile[0], *place[2:], column // pattern.tile[1])
        found.setdefault(key, []).append(place)
    return [found[key] for key in sorted(found)]


def _best_groups(
    groups: Mapping[str, list[_Group]], scores: Mapping[str, Tensor], kept: int, minimum_kept: int
) -> dict[str, list[_Group]]:
    """Rank groups by their mean; take each layer's best ones, then others while that comes nearer to ``kept``."""
    ranked = [(name, group, _mean(group, scores[name])) for name in groups for group in groups[name]]
    ranked.sort(key=lambda entry: -entry[2])  # stable: ties stay in order
    chosen: dict[str, list[_Group]] = {name: [] for name in groups}
    held = dict.fromkeys(groups, 0)
    others: list[tuple[str, _Group]] = []
    for name, group, _ in ranked:
        if held[name] < min(minimum_kept, scores[name].numel()):
            chosen[name].append(group)
            held[name] += len(group)
        else:
            others.append((name, group))
    total = sum(held.values())
    for name, group in others:
        if abs(total + len(group) - kept) >= abs(total - kept):
            break
        chosen[name].append(group)
        total += len(group)
    return chosen


def _mean(group: _Group, scores: Tensor) -> float:
    values = _values(group, scores)
    while len(values) > 1:  # the order of additions is part of the definition, since it decides on near ties
        half = len(values) // 2
        values = [left + right for left, right in zip(values, values[half : 2 * half], strict=False)] + values[
            2 * half :
        ]
    return values[0] / len(group)


def _values(group: Iterable[_Place], scores: Tensor) -> list[float]:
    return [min(max(float(scores[place]), -LARGEST), LARGEST) for place in group]


def _best(group: _Group, scores: Tensor, pattern: NM) -> _Group:
    """Return the places that N:M keeps of one group."""
    if not pattern.transposable:
        return sorted(group, key=lambda place: -float(scores[place]))[: pattern.n]
    n, m = pattern.n, pattern.m
    flat = _values(group, scores)
    cells = [flat[row * m : (row + 1) * m] for row in range(m)]
    chosen = _try_all(cells, n) if m <= 4 else _fill_and_exchange(cells, n)
    return [group[row * m + column] for row, column in chosen]


def _try_all(cells: _Cells, n: int) -> _Chosen:
    """Return the choice of the largest sum, of equal ones the first in the order of `itertools`."""
    m = len(cells)
    best, found = -math.inf, _Chosen()
    for choice in itertools.product(itertools.combinations(range(m), n), repeat=m):
        if all(sum(column in row for row in choice) == n for column in range(m)):
            total = sum(sum(cells[row][column] for column in columns) for row, columns in enumerate(choice))
            if total > best:
                best, found = total, {(row, column) for row, columns in enumerate(choice) for column in columns}
    return found


def _fill_and_exchange(cells: _Cells, n: int) -> _Chosen:
    every = list(itertools.product(range(len(cells)), repeat=2))
    chosen: _Chosen = set()
    for row, column in sorted(every, key=lambda cell: -cells[cell[0]][cell[1]]):
        if _in_row(chosen, row) < n and _in_column(chosen, column) < n:
            chosen.add((row, column))
    while len(chosen) < n * len(cells):
        _complete_by_one(chosen, cells, n)
    _exchange(chosen, cells)
    return chosen


def _complete_by_one(chosen: _Chosen, cells: _Cells, n: int) -> None:
    """Make the best exchange that lengthens the first short row and the first short column."""
    m = len(cells)
    row = next(row for row in range(m) if _in_row(chosen, row) < n)
    column = next(column for column in range(m) if _in_column(chosen, column) < n)
    ways = [(i, j) for i, j in sorted(chosen) if (row, j) not in chosen and (i, column) not in chosen]
    i, j = max(ways, key=lambda way: cells[row][way[1]] + cells[way[0]][column] - cells[way[0]][way[1]])
    chosen.remove((i, j))
    chosen.update({(row, j), (i, column)})


def _exchange(chosen: _Chosen, cells: _Cells) -> None:
    """Exchange a column between two rows, the best one first, as long as any pair of rows gains."""
    m = len(cells)
    gained = True
    while gained:
        gained = False
        for i, k in itertools.combinations(range(m), 2):
            prefers = [cells[i][column] - cells[k][column] for column in range(m)]
            own = [column for column in range(m) if (i, column) in chosen and (k, column) not in chosen]
            other = [column for column in range(m) if (k, column) in chosen and (i, column) not in chosen]
            if own and max(prefers[c] for c in other) > min(prefers[c] for c in own):
                given = min(own, key=lambda column: prefers[column])
                taken = max(other, key=lambda column: prefers[column])
                chosen -= {(i, given), (k, taken)}
                chosen |= {(i, taken), (k, given)}
                gained = True


def _in_row(chosen: _Chosen, row: int) -> int:
    return sum(cell[0] == row for cell in chosen)


def _in_column(chosen: _Chosen, column: int) -> int:
    return sum(cell[1] == column for cell in chosen)
