"""How many weights whole groups hold: counts that follow from shapes, before any score is seen."""

import math
from collections.abc import Mapping, Sequence

from sparsetwin.distributions import Budget
from sparsetwin.errors import SelectionError
from sparsetwin.grouped_selection._layout import Grouped
from sparsetwin.patterns import NM, Channel, Pattern, Unstructured

Shapes = Mapping[str, Sequence[int]]


def group_size(pattern: Grouped, shape: Sequence[int]) -> int:
    """Return the number of weights in each group of a layer."""
    if isinstance(pattern, Channel):
        return math.prod(shape) // max(1, shape[pattern.axis])
    return math.prod(pattern.tile)


def least_groups(pattern: Grouped, shape: Sequence[int], *, minimum_kept: int) -> int:
    """Return how many groups a layer keeps in any case, to hold ``minimum_kept`` weights or all it has."""
    return -(-min(minimum_kept, math.prod(shape)) // max(1, group_size(pattern, shape)))


def check_groups(budgets: Sequence[Budget], shapes: Shapes, *, pattern: Pattern, minimum_kept: int = 1) -> None:
    """Refuse, before training, budgets that whole groups cannot meet.

    A layer with a budget of its own keeps its best group even where that is more than the budget.

    Args:
        budgets: What a distribution returned.
        shapes: Canonical name -> shape of the weight.
        pattern: Which weights live and die together; it has passed `sparsetwin.patterns.check_pattern`.
        minimum_kept: Weights that every layer keeps; a smaller layer keeps all it has.

    Raises:
        SelectionError: If a budget does not agree with N:M, N:M keeps less than ``minimum_kept`` weights of a layer,
            or a budget of several layers is smaller than the groups that they keep in any case.
    """
    if isinstance(pattern, Unstructured):
        return
    for budget in budgets:
        if isinstance(pattern, NM):
            _check_nm(pattern, budget, shapes, minimum_kept)
            continue
        least = sum(_least_kept(pattern, shapes[name], minimum_kept) for name in budget.names)
        if least > budget.kept and len(budget.names) > 1:
            raise SelectionError(
                f"{budget.kept} weights are too few for {len(budget.names)} layers with {pattern}: whole groups that "
                f"hold at least {minimum_kept} of each layer's weights are {least} weights; lower the sparsity or "
                "minimum_kept, take smaller groups, or exclude layers"
            )


def kept_by(pattern: Pattern, budgets: Sequence[Budget], shapes: Shapes, *, minimum_kept: int = 1) -> int | None:
    """Return how many weights will be kept in all.

    >>> from sparsetwin.patterns import Block
    >>> kept_by(Block(4, 4), [Budget(("a", "b"), 100)], {"a": (16, 16), "b": (16, 8)})  # the nearest of 96 and 112
    96

    Args:
        pattern: Which weights live and die together.
        budgets: What a distribution returned.
        shapes: Canonical name -> shape of the weight.
        minimum_kept: Weights that every layer keeps.

    Returns:
        The number, or None where it depends on the scores: layers whose groups differ in size compete.
    """
    if isinstance(pattern, (Unstructured, NM)):
        return sum(budget.kept for budget in budgets)
    total = 0
    for budget in budgets:
        sizes = {group_size(pattern, shapes[name]) for name in budget.names}
        if len(sizes) > 1:
            return None
        least = sum(_least_kept(pattern, shapes[name], minimum_kept) for name in budget.names)
        for size in sizes:
            whole, rest = divmod(budget.kept, size)
            total += max(least, size * (whole + (2 * rest > size)))
    return total


def _check_nm(pattern: NM, budget: Budget, shapes: Shapes, minimum_kept: int) -> None:
    held = 0
    for name in budget.names:
        size = math.prod(shapes[name])
        kept = size // pattern.m * pattern.n
        if kept < min(minimum_kept, size):
            raise SelectionError(
                f"{pattern.n}:{pattern.m} keeps {kept} weights of {name}, less than minimum_kept={minimum_kept}; lower "
                "that or exclude the layer"
            )
        held += kept
    if held != budget.kept:
        layers = ", ".join(budget.names[:3]) + (" ..." if len(budget.names) > 3 else "")
        raise SelectionError(
            f"{pattern.n}:{pattern.m} keeps {held} weights of {layers}, the budget says {budget.kept}; every layer has "
            f"a sparsity of {pattern.sparsity!r}, so ask for that with Global() or Uniform()"
        )


def _least_kept(pattern: Grouped, shape: Sequence[int], minimum_kept: int) -> int:
    return least_groups(pattern, shape, minimum_kept=minimum_kept) * group_size(pattern, shape)
