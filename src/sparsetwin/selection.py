"""Exactly the requested number of weights: scores and budgets to masks.

No sort and no concatenation. Floats are read as integers of the same order; histograms of 65,536 bins over 16 bits at
a time find the exact score of the last kept weight (two passes for float32, one for the half types, four for
float64), and a last pass writes the masks. Ties at that score are kept in the order of the layers, then row-major.
Counts are integers, so the result depends neither on memory format nor on the number of threads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsetwin.distributions import Budget, check_budgets
from sparsetwin.errors import SelectionError

_DIGIT = 16  # bits a histogram resolves
_BINS = 1 << _DIGIT
_CHUNK = 1 << 19  # elements worked on at a time: what lies in a core's cache
_KEYS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

ScoreOf = Callable[[str], Tensor]


@torch.no_grad()
def select_masks(
    weights: Mapping[str, Tensor], score: ScoreOf, budgets: Sequence[Budget], *, minimum_kept: int = 1
) -> dict[str, Tensor]:
    """Keep the best-scored weights of each budget, exactly as many as it says.

    A layer that the ranking would leave with fewer than ``minimum_kept`` weights keeps its best ``minimum_kept``; the
    others rank for the rest of the budget.

    Args:
        weights: Canonical name -> weight; gives shape, device and memory format of each mask.
        score: Canonical name -> scores of the weight's shape, any float dtype, larger is kept. It is called a few
            times for each layer, so that no more than one layer's scores are in memory.
        budgets: Which layers compete, and for how many weights.
        minimum_kept: Weights that every layer keeps; a smaller layer keeps all it has.

    Returns:
        Canonical name -> bool mask of the weight's shape and memory format, in the order of ``weights``.

    Raises:
        SelectionError: If a score is NaN, or a budget is less than its layers' minimum or more than their weights.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    check_budgets(tuple(budgets), sizes, minimum_kept=minimum_kept)
    masks: dict[str, Tensor] = {}
    for budget in budgets:
        masks |= _select(budget, weights, score, minimum_kept)
    return {name: masks[name] for name in weights if name in masks}


def reference_masks(
    weights: Mapping[str, Tensor], score: ScoreOf, budgets: Sequence[Budget], *, minimum_kept: int = 1
) -> dict[str, Tensor]:
    """Do what `select_masks` does with one stable sort of everything: the plain twin that it is tested against."""
    masks: dict[str, Tensor] = {}
    for budget in budgets:
        flat = {name: score(name).reshape(-1).to(torch.float64) for name in budget.names}
        reserved = {
            name: set(torch.sort(values, descending=True, stable=True).indices[:minimum_kept].tolist())
            for name, values in flat.items()
        }
        ranked = sorted(
            (
                (-value, order, index)
                for order, values in enumerate(flat.values())
                for index, value in enumerate(values.tolist())
            ),
        )
        left = budget.kept - sum(len(indices) for indices in reserved.values())
        chosen = {name: set(indices) for name, indices in reserved.items()}
        for _, order, index in ranked:
            name = budget.names[order]
            if left and index not in reserved[name]:
                chosen[name].add(index)
                left -= 1
        for name in budget.names:
            mask = torch.zeros(weights[name].numel(), dtype=torch.bool)
            mask[sorted(chosen[name])] = True
            masks[name] = mask.reshape(weights[name].shape)
    return masks


@dataclass(frozen=True)
class _Cut:
    """Where a ranking ends: every key above ``key`` is kept, and ``ties`` of those equal to it."""

    key: int
    ties: int


def _select(budget: Budget, weights: Mapping[str, Tensor], score: ScoreOf, minimum_kept: int) -> dict[str, Tensor]:
    total = sum(weights[name].numel() for name in budget.names)
    if budget.kept > total:
        raise SelectionError(f"cannot keep {budget.kept} of {total} weights")
    if budget.kept == total:
        return {
            name: _like(weights[name], torch.ones(weights[name].numel(), dtype=torch.bool)) for name in budget.names
        }
    ranking, guarded = list(budget.names), dict[str, int]()
    while True:
        masks = _rank(ranking, weights, score, budget.kept - sum(guarded.values()))
        emptied = {
            name: least
            for name in ranking
            if int(masks[name].sum()) < (least := min(minimum_kept, weights[name].numel()))
        }
        if not emptied:
            break
        guarded |= emptied
        ranking = [name for name in ranking if name not in guarded]
    for name, kept in guarded.items():
        masks |= _rank([name], weights, score, kept)
    return masks


def _rank(names: Sequence[str], weights: Mapping[str, Tensor], score: ScoreOf, kept: int) -> dict[str, Tensor]:
    """Keep the ``kept`` best of all named layers, ties in the order of the names, then row-major."""
    read = _reader(names, score)
    cut = _find_cut(names, read, kept)
    masks: dict[str, Tensor] = {}
    ties = cut.ties
    for name in names:
        keys = read(name)
        mask = torch.empty(keys.numel(), dtype=torch.bool, device=keys.device)
        for part, out in zip(torch.split(keys, _CHUNK), torch.split(mask, _CHUNK), strict=True):
            ordered = _ordered(part)
            torch.gt(ordered, cut.key, out=out)
            if ties:
                equal = (ordered == cut.key).nonzero().squeeze(1)[:ties]
                out[equal] = True
                ties -= equal.numel()
        masks[name] = _like(weights[name], mask)
    return masks


def _reader(names: Sequence[str], score: ScoreOf) -> ScoreOf:
    """Return a function that reads a layer's scores as flat integers, row-major, all layers in one integer type."""
    dtypes = {score(name).dtype for name in names} if len(names) > 1 else set()
    common = torch.float64 if torch.float64 in dtypes else torch.float32

    def read(name: str) -> Tensor:
        scores = score(name).detach().reshape(-1)
        if len(dtypes) > 1:
            scores = scores.to(common)
        if scores.dtype not in _KEYS:
            raise SelectionError(
                f"the scores of {name} have dtype {scores.dtype}; expected a float of 16, 32 or 64 bits"
            )
        if bool(scores.sum().isnan()) and bool(scores.isnan().any()):  # the sum alone may be infinity minus infinity
            raise SelectionError(f"{int(scores.isnan().sum())} of the {scores.numel()} scores of {name} are NaN")
        return scores.view(_KEYS[scores.dtype])

    return read


def _ordered(bits: Tensor) -> Tensor:
    """Turn the bits of floats into signed integers of the same order; -0.0 and 0.0 become equal."""
    least = torch.iinfo(bits.dtype).min
    largest = torch.iinfo(bits.dtype).max
    sign = bits >> (torch.iinfo(bits.dtype).bits - 1)  # 0, or -1 where negative
    if not bool(sign.any()):
        return bits
    return torch.where(bits == least, 0, bits ^ (sign & largest))


def _find_cut(names: Sequence[str], read: ScoreOf, kept: int) -> _Cut:
    """Find the key of the ``kept``-th best score, 16 bits at a time from the top."""
    bits = torch.iinfo(read(names[0]).dtype).bits
    prefix: int | None = None
    larger = 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        histogram = np.zeros(_BINS, dtype=np.int64)
        for name in names:
            for part in torch.split(read(name), _CHUNK):
                histogram += _histogram(_ordered(part), shift, prefix)
        digit, above = _walk(histogram, kept - larger)
        larger += above
        prefix = digit - _BINS // 2 if prefix is None else (prefix << _DIGIT) | digit
    assert prefix is not None
    return _Cut(prefix, kept - larger)


def _histogram(keys: Tensor, shift: int, prefix: int | None) -> np.ndarray:
    """Count the 16 bits above ``shift`` of the keys whose higher bits equal ``prefix`` (None: the top 16 bits)."""
    if prefix is None:
        digits = (keys >> shift) + _BINS // 2 if keys.element_size() > 2 else keys.to(torch.int32) + _BINS // 2
    else:
        digits = (keys[(keys >> (shift + _DIGIT)) == prefix] >> shift) & (_BINS - 1)
    if digits.is_cuda:
        return torch.bincount(digits, minlength=_BINS).cpu().numpy()
    return np.bincount(digits.numpy(), minlength=_BINS)  # torch.bincount loses to this on busy multi-core machines


def _walk(histogram: np.ndarray, kept: int) -> tuple[int, int]:
    """Walk down from the top bin until ``kept`` is reached; return that bin and the count strictly above it."""
    at_least = np.cumsum(histogram[::-1])
    steps = int(np.searchsorted(at_least, kept))
    return _BINS - 1 - steps, int(at_least[steps - 1]) if steps else 0


def _like(weight: Tensor, mask: Tensor) -> Tensor:
    """Give a flat row-major mask the shape, device and memory format of its weight."""
    mask = mask.reshape(weight.shape).to(weight.device)
    if weight.is_contiguous():
        return mask
    return torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(mask)
