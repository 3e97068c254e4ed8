"""Which rule chooses the masks of which pattern, on whole weights and on those that are spread over processes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparsetwin._compat import is_sharded, local
from sparsetwin.distributions import Budget
from sparsetwin.errors import SelectionError, UsageError
from sparsetwin.grouped_selection._budgets import check_groups
from sparsetwin.grouped_selection._layout import Grouped, empty_mask, groups
from sparsetwin.grouped_selection._nm import keep_best_
from sparsetwin.grouped_selection._ranking import keep_best_groups
from sparsetwin.grouped_selection._transposable import keep_best_transposable_
from sparsetwin.patterns import NM, check_shapes

ScoreOf = Callable[[str], Tensor]


@torch.no_grad()
def select_grouped_masks(
    weights: Mapping[str, Tensor], score: ScoreOf, budgets: Sequence[Budget], *, minimum_kept: int, pattern: Grouped
) -> dict[str, Tensor]:
    """Do what `sparsetwin.selection.select_masks` does for weights that live and die in groups.

    N:M keeps the n best of each group, of equal scores the earlier input channel. Blocks and channels are ranked by the
    mean of their scores in float64, so that groups of different size compare; the best are kept, as many as come
    nearest to the budget in weights, the smaller number if two are equally near, and of each layer at least the best.

    Args:
        weights: Canonical name -> weight. DTensors work for N:M that is not transposable, replicated or cut along
            their outputs; every process has to call this alike.
        score: Canonical name -> scores of the weight's shape, cut as the weight is.
        budgets: Which layers compete, and for how many weights.
        minimum_kept: Weights that every layer keeps, rounded up to whole groups; a smaller layer keeps all it has.
        pattern: Which weights live and die together.

    Returns:
        Canonical name -> bool mask of the weight's shape and memory format, in the order of ``weights``.

    Raises:
        SelectionError: If a score is NaN, groups do not divide a layer, or budgets do not agree with the pattern.
        UsageError: If weights are spread over processes in a way in which the pattern cannot be chosen.
    """
    chosen = {name for budget in budgets for name in budget.names}
    weights = {name: weight for name, weight in weights.items() if name in chosen}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_shapes(pattern, shapes)
    check_groups(budgets, shapes, pattern=pattern, minimum_kept=minimum_kept)
    _check_cuts(pattern, {name: weight for name, weight in weights.items() if is_sharded(weight)})
    _refuse_nan(weights, score)
    if isinstance(pattern, NM):
        return {name: _nm_mask(pattern, weight, score(name)) for name, weight in weights.items()}
    masks: dict[str, Tensor] = {}
    for budget in budgets:
        masks |= keep_best_groups(budget, weights, score, pattern=pattern, minimum_kept=minimum_kept)
    return {name: masks[name] for name in weights}


def _nm_mask(pattern: NM, weight: Tensor, scores: Tensor) -> Tensor:
    held = local(weight.detach())
    mask = empty_mask(held)
    if mask.numel():
        choose_ = keep_best_transposable_ if pattern.transposable else keep_best_
        choose_(groups(mask, pattern), groups(local(scores), pattern), pattern.n)
    if not is_sharded(weight):
        return mask
    from sparsetwin._sharding import like  # loads torch.distributed.tensor

    return like(weight, mask.reshape(-1))


def _check_cuts(pattern: Grouped, sharded: Mapping[str, Tensor]) -> None:
    """Refuse DTensors whose groups may lie in several processes."""
    for name, weight in sharded.items():
        placements = getattr(weight, "placements", ())
        axes = {placement.dim for placement in placements if hasattr(placement, "dim")}
        if not isinstance(pattern, NM) or pattern.transposable or axes - {0}:
            raise UsageError(
                f"{name} is a DTensor with placements {placements}, for which {pattern} cannot be chosen; what "
                "works on DTensors is NM(n, m) on weights that are replicated or sharded on dim 0 alone, and "
                "Unstructured() on any"
            )


def _refuse_nan(weights: Mapping[str, Tensor], score: ScoreOf) -> None:
    """Raise if a score is NaN; where weights are spread over processes, on each of them."""
    counts = [local(score(name)).isnan().sum() for name in weights]
    if any(map(is_sharded, weights.values())):
        from sparsetwin._sharding import Layout  # loads torch.distributed.tensor

        layout = Layout.of(weights)
        assert layout is not None
        summed = torch.stack(counts)
        layout.all_reduce(summed)
        counts = list(summed)
    for name, count in zip(weights, counts, strict=True):
        if count:
            raise SelectionError(f"{int(count)} of the {weights[name].numel()} scores of {name} are NaN")
