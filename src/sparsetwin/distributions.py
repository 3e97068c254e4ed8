"""How many weights each layer, or each group of layers, keeps.

Counts are exact: a group of N weights at sparsity s keeps ``N - round(s * N)``. (The published AC/DC code floors and
drops ties: 1,275,145 weights of ResNet-50 at 95%; here it is 1,275,146.)
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sparsetwin.errors import SelectionError


@dataclass(frozen=True)
class Budget:
    """Layers that compete for the same kept weights."""

    names: tuple[str, ...]  # canonical names, in the model's order
    kept: int  # weights that they keep together


@dataclass(frozen=True)
class Global:
    """One ranking over all layers: the default of AC/DC."""

    def budgets(self, sizes: Mapping[str, int], sparsity: float) -> tuple[Budget, ...]:
        """Return one budget for all layers.

        >>> Global().budgets({"a": 6, "b": 4}, 0.75)
        (Budget(names=('a', 'b'), kept=2),)

        Args:
            sizes: Canonical name -> number of weights, in the model's order.
            sparsity: Fraction in [0, 1).
        """
        total = sum(sizes.values())
        return (Budget(tuple(sizes), total - round(sparsity * total)),)


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every layer, each with a ranking of its own."""

    def budgets(self, sizes: Mapping[str, int], sparsity: float) -> tuple[Budget, ...]:
        """Return a budget for each layer, at least one weight.

        >>> Uniform().budgets({"a": 6, "b": 1}, 0.75)
        (Budget(names=('a',), kept=2), Budget(names=('b',), kept=1))

        Args:
            sizes: Canonical name -> number of weights, in the model's order.
            sparsity: Fraction in [0, 1).
        """
        return tuple(Budget((name,), max(1, size - round(sparsity * size))) for name, size in sizes.items())


Distribution = Global | Uniform


def check_budgets(budgets: tuple[Budget, ...], sizes: Mapping[str, int], *, minimum_kept: int) -> None:
    """Refuse budgets that cannot be met: less than their layers' minimum, or more than their weights.

    Args:
        budgets: What a distribution returned.
        sizes: Canonical name -> number of weights.
        minimum_kept: Weights that each layer keeps in any case; a smaller layer keeps all it has.

    Raises:
        SelectionError: If a budget cannot be met, or ``minimum_kept`` is negative.
    """
    if minimum_kept < 0:
        raise SelectionError(f"minimum_kept needs to be at least 0, got {minimum_kept}")
    for budget in budgets:
        needed = sum(min(minimum_kept, sizes[name]) for name in budget.names)
        total = sum(sizes[name] for name in budget.names)
        if budget.kept < needed:
            layers = budget.names[0] if len(budget.names) == 1 else f"{len(budget.names)} layers"
            raise SelectionError(
                f"{budget.kept} of {total} weights are too few for {layers}: each layer keeps at least {minimum_kept}, "
                f"{needed} in all; lower the sparsity or minimum_kept, or exclude layers"
            )
        if budget.kept > total:
            raise SelectionError(f"cannot keep {budget.kept} of {total} weights; a sparsity is at least 0")
