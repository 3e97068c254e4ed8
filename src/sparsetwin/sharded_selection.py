"""The same masks from weights that are spread over processes, without gathering them.

Every process counts the keys of its own elements; the histograms are summed over the processes (all-reduce), so all
find the same cut. Ties at the cut belong to the elements of lowest global row-major index, which a second descent over
indices finds; so the result depends neither on the number of processes nor on how a tensor is cut. What moves is
histograms and counts: for float32 and the half types at most 2 MB a process for a global ranking and 64 KB for a layer
of its own, and as much again for each time that a layer is lifted to its least number of weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetwin._compat import local
from sparsetwin._sharding import Layout, global_indices, like
from sparsetwin.distributions import Budget
from sparsetwin.errors import SelectionError

AllReduce = Callable[[Tensor], None]
"""Sums a tensor over all processes, in place."""

_KEYS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_WIDE, _NARROW = 16, 11  # bits that a histogram resolves, for rankings over several layers and over one
_PIECE = 1 << 20  # elements worked on at a time


@dataclass(frozen=True)
class Shard:
    """What one process holds of a layer's scores."""

    scores: Tensor  # (elements here,), float; may be empty
    indices: Callable[[], Tensor]  # global row-major index of each of them, int64
    counts: bool  # False on all but one of the processes that hold copies of the same elements
    size: int  # elements of the whole layer


ShardOf = Callable[[str], Shard]


def select_sharded_masks(
    weights: Mapping[str, Tensor],
    score: Callable[[str], Tensor],
    budgets: Sequence[Budget],
    *,
    minimum_kept: int,
) -> dict[str, Tensor]:
    """Do what `sparsetwin.selection.select_masks` does for weights of which some are DTensors.

    Every process that holds a part has to call this alike; the masks are cut as the weights are.

    Args:
        weights: Canonical name -> weight, all on slices of one device mesh.
        score: Canonical name -> scores, cut as the weight is.
        budgets: Which layers compete, and for how many weights.
        minimum_kept: Weights that every layer keeps; a smaller layer keeps all it has.

    Returns:
        Canonical name -> bool mask, a DTensor where the weight is one.

    Raises:
        SelectionError: On every process, if a score is NaN on one of them.
        UsageError: If the weights lie on meshes that have no root in common.
    """
    layout = Layout.of(weights)
    if layout is None:
        raise SelectionError("no weight is sharded; use select_masks")

    def shard(name: str) -> Shard:
        weight = weights[name]
        return Shard(
            scores=local(score(name).detach()).reshape(-1),
            indices=lambda: global_indices(weight),
            counts=layout.counts(weight),
            size=weight.numel(),
        )

    names = [name for budget in budgets for name in budget.names]
    found = select_from_shards(budgets, shard, names=names, minimum_kept=minimum_kept, all_reduce=layout.all_reduce)
    return {name: like(weight, found[name]) for name, weight in weights.items() if name in found}


@torch.no_grad()
def select_from_shards(
    budgets: Sequence[Budget], shard: ShardOf, *, names: Sequence[str], minimum_kept: int, all_reduce: AllReduce
) -> dict[str, Tensor]:
    """Keep the best-scored weights of each budget; every process has to call this alike.

    Args:
        budgets: Which layers compete, and for how many weights.
        shard: Canonical name -> what this process holds; called a few times for each layer.
        names: All layers.
        minimum_kept: Weights that every layer keeps; a smaller layer keeps all it has.
        all_reduce: Sums over all processes.

    Returns:
        Canonical name -> bool mask of this process's elements, flat.

    Raises:
        SelectionError: On every process, if a score is NaN on one of them.
    """
    _refuse_nan(names, shard, all_reduce)
    masks: dict[str, Tensor] = {}
    for budget in budgets:
        floors = {name: min(minimum_kept, shard(name).size) for name in budget.names}
        for name, cut in _cuts(budget, floors, shard, all_reduce).items():
            masks[name] = _mask(name, cut, shard, all_reduce)
    return masks


@dataclass(frozen=True)
class _Cut:
    """Where a ranking ends: keys above ``key`` are kept, and of those equal to it so many in each layer."""

    key: int
    dtype: torch.dtype  # in which scores were compared
    above: dict[str, int]  # layer -> keys above, over all processes
    equal: dict[str, int]  # layer -> keys equal, over all processes
    ties: dict[str, int]  # layer -> how many of the equal ones are kept

    def kept(self, name: str) -> int:
        return self.above[name] + self.ties[name]


def _cuts(budget: Budget, floors: Mapping[str, int], shard: ShardOf, all_reduce: AllReduce) -> dict[str, _Cut]:
    """Return each layer's cut; layers that the ranking would leave below their floor get one of their own."""
    ranking, guarded = list(budget.names), list[str]()
    cuts: dict[str, _Cut] = {}
    while ranking:
        cut = _find_cut(ranking, budget.kept - sum(floors[name] for name in guarded), shard, all_reduce)
        short = [name for name in ranking if cut.kept(name) < floors[name]]
        if not short:
            cuts |= dict.fromkeys(ranking, cut)
            break
        guarded += short
        ranking = [name for name in ranking if name not in short]
    return cuts | {name: _find_cut([name], floors[name], shard, all_reduce) for name in guarded}


def _find_cut(names: Sequence[str], kept: int, shard: ShardOf, all_reduce: AllReduce) -> _Cut:
    dtype = shard(names[0]).scores.dtype
    for name in names:
        dtype = torch.promote_types(dtype, shard(name).scores.dtype)
    device = shard(names[0]).scores.device
    total = sum(shard(name).size for name in names)

    def keys() -> Iterator[Tensor]:
        for name in names:
            held = shard(name)
            yield from _keys(held.scores, dtype) if held.counts else ()

    key = _largest(
        keys, kept, bits=8 * dtype.itemsize, digit=_WIDE if len(names) > 1 else _NARROW,
        total=total, device=device, all_reduce=all_reduce,
    )  # fmt: skip
    counts = torch.zeros(2 * len(names), dtype=torch.int64, device=device)
    for place, name in enumerate(names):
        held = shard(name)
        for piece in _keys(held.scores, dtype) if held.counts else ():
            counts[2 * place] += (piece > key).sum()
            counts[2 * place + 1] += (piece == key).sum()
    all_reduce(counts)
    above = dict(zip(names, counts[::2].tolist(), strict=True))
    equal = dict(zip(names, counts[1::2].tolist(), strict=True))
    left = kept - sum(above.values())
    ties: dict[str, int] = {}
    for name in names:
        ties[name] = min(left, equal[name])
        left -= ties[name]
    return _Cut(key, dtype, above, equal, ties)


def _largest(
    keys: Callable[[], Iterator[Tensor]],
    rank: int,
    *,
    bits: int,
    digit: int,
    total: int,
    device: torch.device,
    all_reduce: AllReduce,
) -> int:
    """Return the ``rank``-th largest of signed integers of ``bits`` bits that are spread over processes."""
    prefix: int | None = None
    low = bits  # bits that are not yet known
    while low:
        width = min(digit, low)
        low -= width
        bins = 1 << width
        # int32 halves what is sent wherever no count can overflow it
        histogram = torch.zeros(bins, dtype=torch.int32 if total < 2**31 else torch.int64, device=device)
        for piece in keys():
            if prefix is None:
                digits = (piece >> low) + bins // 2
            else:
                digits = (piece[piece >> (low + width) == prefix] >> low) & (bins - 1)
            histogram += torch.bincount(digits, minlength=bins)
        all_reduce(histogram)
        at_least = histogram.long().flip(0).cumsum(0).cpu()
        place = int(torch.searchsorted(at_least, max(rank, 1)))
        rank -= int(at_least[place - 1]) if place else 0
        found = bins - 1 - place
        prefix = found - bins // 2 if prefix is None else prefix << width | found
    assert prefix is not None
    return prefix


def _mask(name: str, cut: _Cut, shard: ShardOf, all_reduce: AllReduce) -> Tensor:
    """Return the mask of this process's elements of a layer."""
    held = shard(name)
    pieces = list(_keys(held.scores, cut.dtype))
    keys = torch.cat(pieces) if pieces else held.scores.new_empty(0, dtype=torch.int64)
    if cut.ties[name] == cut.equal[name]:
        return keys >= cut.key
    mask = keys > cut.key
    if cut.ties[name]:
        order = held.size - 1 - held.indices()  # the first element is the largest
        tied = keys == cut.key
        bits = held.size.bit_length() + 1  # one for the sign
        counted = order[tied] if held.counts else order[:0]
        last = _largest(
            lambda: iter((counted,)), cut.ties[name], bits=bits, digit=_NARROW,
            total=held.size, device=keys.device, all_reduce=all_reduce,
        )  # fmt: skip
        mask |= tied & (order >= last)
    return mask


def _keys(scores: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield flat scores piece by piece as int64 of the same order; -0.0 and 0.0 become equal."""
    if dtype not in _KEYS:
        raise SelectionError(f"scores of dtype {dtype}; expected a float of 16, 32 or 64 bits")
    for piece in torch.split(scores, _PIECE):
        signed = piece.to(dtype).view(_KEYS[dtype])
        largest = torch.iinfo(signed.dtype).max
        sign = signed >> (8 * dtype.itemsize - 1)  # 0, or -1 where negative
        yield (((signed & largest) ^ sign) - sign).long()


def _refuse_nan(names: Sequence[str], shard: ShardOf, all_reduce: AllReduce) -> None:
    counts = torch.stack([shard(name).scores.isnan().sum() for name in names])
    all_reduce(counts)
    for name, count in zip(names, counts.tolist(), strict=True):
        if count:
            raise SelectionError(f"{count} of the {shard(name).size} scores of {name} are NaN")
