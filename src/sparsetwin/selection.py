"""Exactly the requested number of weights: scores and budgets to masks.

No sort and no concatenation. Floats are read as integers of the same order, their keys. One pass counts the top 16
bits of all keys, which tells in which of 65,536 bins the last kept weight lies. A second pass keeps what lies above
that bin and sets the lower bits of the keys in it aside (commonly those of less than 1% of float32 weights); among
these the exact cut is found, 16 bits at a time. Ties at the cut are kept in the order of the layers, then row-major.
Counts are integers, so the result depends neither on memory format nor on the number of threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetwin._compat import is_sharded
from sparsetwin.distributions import Budget, check_budgets
from sparsetwin.errors import SelectionError
from sparsetwin.patterns import Pattern, Unstructured

_DIGIT = 16  # bits that a histogram resolves
_BINS = 1 << _DIGIT
_PIECE = 1 << 16  # elements worked on at a time: what lies in a core's cache
_DEVICE_PIECE = 1 << 24  # the same on an accelerator, where the launch of a kernel counts
_KEYS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_LOWER = {2: np.uint8, 4: np.uint16, 8: np.int64}  # bytes of a key -> what holds all but its top 16 bits
_LOWER_SHIFTS = {1: (), 2: (0,), 8: (32, 16, 0)}  # bytes of that -> where its 16-bit digits begin, the top one first
_IN_BIN = 2  # mark of a key in the bin where the cut lies; 1 is above it and kept, 0 below it and pruned
_UNSTRUCTURED = Unstructured()

ScoreOf = Callable[[str], Tensor]
_Array = NDArray[Any]
_Piece = Any  # a numpy array on a CPU, a tensor elsewhere; only operators that both have are used on it


@torch.no_grad()
def select_masks(
    weights: Mapping[str, Tensor],
    score: ScoreOf,
    budgets: Sequence[Budget],
    *,
    minimum_kept: int = 1,
    pattern: Pattern = _UNSTRUCTURED,
) -> dict[str, Tensor]:
    """Keep the best-scored weights of each budget, exactly as many as it says.

    A layer that the ranking would leave with fewer than ``minimum_kept`` weights keeps its best ``minimum_kept``; the
    others rank for the rest of the budget. Where a pattern makes weights live and die in groups, whole groups are kept:
    of N:M as many as the pattern says, of blocks and channels the number that comes nearest to the budget.

    >>> weights = {"a": torch.tensor([[3.0, -1.0], [2.0, 2.0]]), "b": torch.tensor([0.5, 0.1])}
    >>> select_masks(weights, lambda name: weights[name].abs(), [Budget(("a", "b"), kept=3)])
    {'a': tensor([[ True, False],
        [ True, False]]), 'b': tensor([ True, False])}

    Args:
        weights: Canonical name -> weight; gives shape, device and memory format of each mask.
        score: Canonical name -> scores of the weight's shape, float of 16, 32 or 64 bits, larger is kept. It is called
            twice or more for each layer, so that no more than one layer's scores are in memory, and has to return the
            same each time.
        budgets: Which layers compete, and for how many weights. A layer in none of them gets no mask.
        minimum_kept: Weights that every layer keeps; a smaller layer keeps all it has.
        pattern: Which weights live and die together.

    Returns:
        Canonical name -> bool mask of the weight's shape and memory format, in the order of ``weights``.

    Raises:
        SelectionError: If a score is NaN, of another shape than its weight or not a float; if a budget is less than
            its layers' minimum or more than their weights; if a layer is unknown or in two budgets; if the groups of
            the pattern do not divide a layer, or a budget does not agree with N:M.
        UsageError: If weights are sharded in a way in which the pattern cannot be chosen.
    """
    _check_names(weights, budgets)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    check_budgets(tuple(budgets), sizes, minimum_kept=minimum_kept)
    read = _checked(weights, score)
    if not isinstance(pattern, Unstructured):
        from sparsetwin.grouped_selection import select_grouped_masks  # loaded by those who ask for a pattern

        return select_grouped_masks(weights, read, budgets, minimum_kept=minimum_kept, pattern=pattern)
    if any(is_sharded(weight) for weight in weights.values()):
        from sparsetwin.sharded_selection import select_sharded_masks  # loads torch.distributed.tensor

        return select_sharded_masks(weights, score, budgets, minimum_kept=minimum_kept)
    masks: dict[str, Tensor] = {}
    for budget in budgets:
        floors = {name: min(minimum_kept, sizes[name]) for name in budget.names}
        flat = _select(budget, floors, lambda name: read(name).reshape(-1))
        masks |= {name: _like(weights[name], flat.pop(name)) for name in budget.names}
    return {name: masks[name] for name in weights if name in masks}


def reference_masks(
    weights: Mapping[str, Tensor], score: ScoreOf, budgets: Sequence[Budget], *, minimum_kept: int = 1
) -> dict[str, Tensor]:
    """Do what `select_masks` does by sorting single weights: the plain twin that it is tested against."""
    masks = {name: torch.zeros(weights[name].shape, dtype=torch.bool) for budget in budgets for name in budget.names}
    for budget in budgets:
        scores = {name: score(name).flatten().tolist() for name in budget.names}
        places = [(name, index) for name in budget.names for index in range(len(scores[name]))]
        ranking = sorted(places, key=lambda place: -scores[place[0]][place[1]])  # stable: ties stay in order
        reserved = {place for name in scores for place in [p for p in ranking if p[0] == name][:minimum_kept]}
        others = [place for place in ranking if place not in reserved]
        for name, index in [*reserved, *others[: budget.kept - len(reserved)]]:
            masks[name].view(-1)[index] = True
    return masks


def _check_names(weights: Mapping[str, Tensor], budgets: Sequence[Budget]) -> None:
    seen: set[str] = set()
    for name in (name for budget in budgets for name in budget.names):
        if name not in weights:
            raise SelectionError(f"a budget names {name}, which is not among the weights")
        if name in seen:
            raise SelectionError(f"{name} is in two budgets, or twice in one; a layer competes once")
        seen.add(name)


def _checked(weights: Mapping[str, Tensor], score: ScoreOf) -> ScoreOf:
    """Return a function that gives a layer's scores, once their shape and dtype are known to be right."""

    def read(name: str) -> Tensor:
        scores = score(name).detach()
        if scores.shape != weights[name].shape:
            raise SelectionError(
                f"the scores of {name} have shape {tuple(scores.shape)}, its weight {tuple(weights[name].shape)}"
            )
        if scores.dtype not in _KEYS:
            raise SelectionError(
                f"the scores of {name} have dtype {scores.dtype}; expected a float of 16, 32 or 64 bits"
            )
        return scores

    return read


def _select(budget: Budget, floors: Mapping[str, int], read: ScoreOf) -> dict[str, Tensor]:
    """Return flat masks of a budget's layers, none with fewer weights than its floor."""
    layers = _count_top_bits(budget.names, read)
    ranking, guarded = list(budget.names), list[str]()
    masks: dict[str, Tensor] = {}
    while ranking:
        kept = budget.kept - sum(floors[name] for name in guarded)
        digit, _ = layers.walk(ranking, kept)
        short = [name for name in ranking if layers.at_least(name, digit) < floors[name]]
        if not short:  # as far as the top bits tell
            masks = _rank(layers, ranking, kept)
            short = [name for name in ranking if _count(masks[name]) < floors[name]]
        if not short:
            break
        guarded += short
        ranking = [name for name in ranking if name not in short]
    for name in guarded:
        masks |= _rank(layers, [name], floors[name])
    if sum(map(_count, masks.values())) != budget.kept:
        raise SelectionError(f"a score changed from one reading to the next, among {', '.join(budget.names[:3])}")
    return masks


@dataclass(frozen=True)
class _Layers:
    """Scores that compete, and how many of each layer have which top 16 bits."""

    read: ScoreOf
    dtype: torch.dtype  # in which scores are compared: the narrowest that holds every layer's exactly
    bins: Mapping[str, _Array]  # top 16 bits that occur in a layer, counted from the lowest key up
    counts: Mapping[str, _Array]  # how often each of them does

    def keys_of(self, name: str) -> Tensor:
        """Return the layer's scores in the common dtype."""
        return self.read(name).to(self.dtype)

    def at_least(self, name: str, digit: int) -> int:
        """Return how many keys of a layer lie in or above a bin."""
        return int(self.counts[name][self.bins[name] >= digit].sum())

    def walk(self, names: Sequence[str], kept: int) -> tuple[int, int]:
        """Return the bin of the ``kept``-th best key of all named layers, and how many keys lie above that bin."""
        total = np.zeros(_BINS, dtype=np.int64)
        for name in names:
            total[self.bins[name]] += self.counts[name]
        return _walk(total, kept)


def _count_top_bits(names: Sequence[str], read: ScoreOf, dtype: torch.dtype | None = None) -> _Layers:
    """Count the top 16 bits of each layer's keys. A layer of a wider dtype than those before it starts it again."""
    bins: dict[str, _Array] = {}
    counts: dict[str, _Array] = {}
    for name in names:
        histogram, common = _histogram(name, read, dtype)
        if dtype not in (None, common):
            return _count_top_bits(names, read, common)
        dtype = common
        bins[name] = np.flatnonzero(histogram)
        counts[name] = histogram[bins[name]]
    return _Layers(read, dtype or torch.float32, bins, counts)


def _histogram(name: str, read: ScoreOf, dtype: torch.dtype | None) -> tuple[_Array, torch.dtype]:
    """Count the top 16 bits of a layer's keys, the lowest first, in ``dtype`` or a wider one; return it, too."""
    histogram = np.zeros(_BINS, dtype=np.int64)
    scores = read(name)
    dtype = torch.promote_types(dtype or scores.dtype, scores.dtype)
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(_KEYS[dtype]))
    for keys in _ordered_keys(scores.to(dtype)):
        if keys.max() > infinity or keys.min() < -infinity:
            raise SelectionError(f"{int(scores.isnan().sum())} of the {scores.numel()} scores of {name} are NaN")
        counted = _bincount(keys, shift=8 * dtype.itemsize - _DIGIT)
        histogram[: counted.size] += counted
    return np.roll(histogram, _BINS // 2), dtype  # negative keys, unsigned the upper half, come first


def _rank(layers: _Layers, names: Sequence[str], kept: int) -> dict[str, Tensor]:
    """Keep the ``kept`` best of all named layers, as flat masks; ties in the order of the names, then row-major."""
    if not kept:
        return {name: torch.zeros_like(layers.read(name), dtype=torch.bool) for name in names}
    digit, above = layers.walk(names, kept)
    marks: dict[str, Tensor] = {}
    in_bin: dict[str, _Array] = {}
    for name in names:
        marks[name], in_bin[name] = _mark(layers.keys_of(name), digit - _BINS // 2)
    cut, ties = _find_cut(list(in_bin.values()), kept - above)
    for name in names:
        keep = in_bin[name] > cut
        if ties:
            equal = np.flatnonzero(in_bin[name] == cut)[:ties]
            keep[equal] = True
            ties -= equal.size
        _settle_(marks[name], keep)
    return {name: mark.view(torch.bool) for name, mark in marks.items()}


def _mark(scores: Tensor, digit: int) -> tuple[Tensor, _Array]:
    """Mark each key by its top 16 bits: 1 above ``digit``, `_IN_BIN` equal to it, 0 below.

    Returns:
        The marks, uint8, and the lower bits of the keys that are in the bin, in order.
    """
    marks = torch.empty_like(scores, dtype=torch.uint8)
    shift = 8 * scores.dtype.itemsize - _DIGIT
    lower = [np.empty(0, dtype=_LOWER[scores.dtype.itemsize])]
    for keys, mark in zip(_ordered_keys(scores), _pieces(marks), strict=True):
        reached, passed = keys >= digit << shift, keys >= (digit + 1) << shift
        mark[...] = (reached.view(mark.dtype) << 1) - passed.view(mark.dtype)
        found = keys[mark == _IN_BIN] & ((1 << shift) - 1)
        lower.append((found if isinstance(found, np.ndarray) else found.cpu().numpy()).astype(lower[0].dtype))
    return marks, np.concatenate(lower)


def _find_cut(numbers: Sequence[_Array], kept: int) -> tuple[int, int]:
    """Find the ``kept``-th largest of all numbers; return it, and how many of those equal to it are kept."""
    cut = 0
    for shift in _LOWER_SHIFTS[numbers[0].itemsize]:
        histogram = np.zeros(_BINS, dtype=np.int64)
        for piece in (layer[start : start + _PIECE] for layer in numbers for start in range(0, layer.size, _PIECE)):
            candidates = piece[piece >> (shift + _DIGIT) == cut] if piece.itemsize > 2 else piece
            histogram += np.bincount(candidates >> shift & (_BINS - 1), minlength=_BINS)
        digit, above = _walk(histogram, kept)
        cut, kept = cut << _DIGIT | digit, kept - above
    return cut, kept


def _walk(histogram: _Array, kept: int) -> tuple[int, int]:
    """Walk down from the top bin until ``kept`` is reached; return that bin and the count strictly above it."""
    at_least = np.cumsum(histogram[::-1])
    steps = int(np.searchsorted(at_least, kept))
    return histogram.size - 1 - steps, int(at_least[steps - 1]) if steps else 0


# On a CPU pieces are numpy's: one thread, which beats torch's several on pieces that lie in its cache


def _pieces(flat: Tensor) -> Iterator[_Piece]:
    """Split into views."""
    on_cpu = flat.device.type == "cpu"
    whole, length = (flat.numpy(), _PIECE) if on_cpu else (flat, _DEVICE_PIECE)
    for start in range(0, flat.numel(), length):
        yield whole[start : start + length]


def _ordered_keys(scores: Tensor) -> Iterator[_Piece]:
    """Yield flat scores piece by piece as signed integers of the same order; -0.0 and 0.0 become equal."""
    bits = scores.view(_KEYS[scores.dtype])
    largest = torch.iinfo(bits.dtype).max
    for piece in _pieces(bits):
        if piece.min() >= 0:
            yield piece
        else:
            sign = piece >> (torch.iinfo(bits.dtype).bits - 1)  # 0, or -1 where negative
            yield ((piece & largest) ^ sign) - sign


def _bincount(keys: _Piece, *, shift: int) -> _Array:
    """Count the 16 bits above ``shift`` of each key, as unsigned numbers, up to the largest that occurs."""
    if isinstance(keys, np.ndarray):
        top = keys.view(f"u{keys.itemsize}") >> shift
        return np.bincount(top.astype(np.int64))
    counted: _Array = torch.bincount((keys.long() >> shift) & (_BINS - 1)).cpu().numpy()
    return counted


def _settle_(marks: Tensor, keep: _Array) -> None:
    """Decide on the keys marked `_IN_BIN`, in their order and in place."""
    if marks.device.type == "cpu":
        np.place(marks.numpy(), marks.numpy() == _IN_BIN, keep)
    else:
        marks[marks == _IN_BIN] = torch.from_numpy(keep).to(marks)


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.count_nonzero())


def _like(weight: Tensor, mask: Tensor) -> Tensor:
    """Give a flat row-major mask the shape, device and memory format of its weight."""
    mask = mask.reshape(weight.shape).to(weight.device)
    if weight.is_contiguous():
        return mask
    return torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(mask)
