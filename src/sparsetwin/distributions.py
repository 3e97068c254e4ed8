"""How many weights each layer, or each group of layers, keeps.

Counts are exact: a group of N weights at sparsity s keeps ``N - round(s * N)``. (The published AC/DC code floors and
drops ties: 1,275,145 weights of ResNet-50 at 95%; here it is 1,275,146.)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sparsetwin._matching import name_matcher
from sparsetwin.errors import ConfigError, SelectionError, TargetError, nearest

Shapes = Mapping[str, Sequence[int]]
"""Canonical name -> shape of the weight, in the model's order."""


@dataclass(frozen=True)
class Budget:
    """Layers that compete for the same kept weights."""

    names: tuple[str, ...]  # canonical names, in the model's order
    kept: int  # weights that they keep together


@dataclass(frozen=True)
class Global:
    """One ranking over all layers: the default of AC/DC."""

    def budgets(self, shapes: Shapes, sparsity: float) -> tuple[Budget, ...]:
        """Return one budget for all layers.

        >>> Global().budgets({"a": (3, 2), "b": (4,)}, 0.75)
        (Budget(names=('a', 'b'), kept=2),)

        Args:
            shapes: Canonical name -> shape of the weight, in the model's order.
            sparsity: Fraction in [0, 1).
        """
        return (Budget(tuple(shapes), _kept_in_all(_sizes(shapes), sparsity)),)


@dataclass(frozen=True)
class Uniform:
    """The same sparsity in every layer, each with a ranking of its own."""

    def budgets(self, shapes: Shapes, sparsity: float) -> tuple[Budget, ...]:
        """Return a budget for each layer, at least one weight.

        >>> Uniform().budgets({"a": (3, 2), "b": (1,)}, 0.75)
        (Budget(names=('a',), kept=2), Budget(names=('b',), kept=1))

        Args:
            shapes: Canonical name -> shape of the weight, in the model's order.
            sparsity: Fraction in [0, 1).
        """
        sizes = _sizes(shapes)
        return tuple(Budget((name,), max(1, size - round(sparsity * size))) for name, size in sizes.items())


@dataclass(frozen=True)
class ERK:
    """Erdős–Rényi-kernel: wide layers are sparser, small ones denser, each with a ranking of its own.

    A layer's density is proportional to the sum of its weight's dimensions over their product, linear layers alike.
    Layers that would need a density above 1 are dense, and the others share what is left, until none exceeds 1.

    Source: Evci et al., 2020, arXiv 1911.11134, section 3; Mocanu et al., 2018, for linear layers.
    """

    def budgets(self, shapes: Shapes, sparsity: float) -> tuple[Budget, ...]:
        """Return a budget for each layer, at least one weight; the total is that of `Global`.

        >>> ERK().budgets({"wide": (8, 8), "narrow": (8, 2)}, 0.7)  # densities as 16/64 to 10/16; 24 weights in all
        (Budget(names=('wide',), kept=15), Budget(names=('narrow',), kept=9))

        Args:
            shapes: Canonical name -> shape of the weight, in the model's order.
            sparsity: Fraction in [0, 1).

        Raises:
            SelectionError: If fewer weights than layers are to be kept.
        """
        sizes = _sizes(shapes)
        total = _kept_in_all(sizes, sparsity)
        dimensions = {name: sum(shape) for name, shape in shapes.items()}
        dense: set[str] = set()
        while len(dense) < len(sizes):
            left = total - sum(sizes[name] for name in dense)
            epsilon = Fraction(left, max(1, sum(dimensions[name] for name in sizes if name not in dense)))
            above = {name for name in sizes if name not in dense and epsilon * dimensions[name] > sizes[name]}
            if not above:
                break
            dense |= above
        wanted = {n: Fraction(size) if n in dense else epsilon * dimensions[n] for n, size in sizes.items()}
        return _rounded(wanted, sizes, total)


@dataclass(frozen=True, init=False)
class PerLayer:
    """A sparsity of its own for every layer, each with a ranking of its own.

    Where a phase asks for another sparsity than the layers' overall one, theirs are scaled linearly.

    Raises:
        ConfigError: If the map is empty, or a sparsity is not in [0, 1).
    """

    sparsities: tuple[tuple[str, float], ...]
    """Name, glob or ``re:`` expression and sparsity, in [0, 1), as pairs."""

    def __init__(self, sparsities: Mapping[str, float] | Iterable[tuple[str, float]]) -> None:
        """Take a map of sparsities.

        Args:
            sparsities: What `sparsetwin.Targets` takes as a selector, by name, glob or ``re:`` expression -> sparsity
                in [0, 1). Every layer has to match exactly one key.
        """
        given = dict(sparsities)
        if not given:
            raise ConfigError("a map of sparsities is empty; expected a name, glob or re: expression for every layer")
        for key, sparsity in given.items():
            if not 0 <= sparsity < 1:
                raise ConfigError(f"the sparsity of {key!r} is {sparsity!r}; expected a number in [0, 1)")
        object.__setattr__(self, "sparsities", tuple((key, float(sparsity)) for key, sparsity in given.items()))

    def budgets(self, shapes: Shapes, sparsity: float) -> tuple[Budget, ...]:
        """Return a budget for each layer, at least one weight; the total is that of `Global`.

        >>> layers = PerLayer({"stem": 0.5, "body.*": 0.9})
        >>> layers.budgets({"stem.weight": (10,), "body.0.weight": (10, 4)}, 0.82)
        (Budget(names=('stem.weight',), kept=5), Budget(names=('body.0.weight',), kept=4))

        Args:
            shapes: Canonical name -> shape of the weight, in the model's order.
            sparsity: Fraction in [0, 1). Equal to `overall_sparsity`, layers have the map's own sparsities.

        Raises:
            TargetError: If a layer matches no key or several, or a key matches no layer.
            SelectionError: If a scaled sparsity would be 1 or more, or fewer weights than layers are to be kept.
        """
        sizes = _sizes(shapes)
        own = self._of_layers(sizes)
        overall = _overall(own, sizes)
        scale = Fraction(1)
        if not math.isclose(overall, sparsity, rel_tol=0.0, abs_tol=1e-9):
            if not overall:
                raise SelectionError(f"every layer of the map is dense, which cannot be scaled to {sparsity!r}")
            scale = _as_written(sparsity) / overall
        wanted: dict[str, Fraction] = {}
        for name, size in sizes.items():
            if own[name] * scale >= 1:
                raise SelectionError(
                    f"{name} would have a sparsity of {float(own[name] * scale):.6g}: its {float(own[name]):.6g} is "
                    f"scaled from the map's overall sparsity of {float(overall):.6g} to {sparsity!r}; expected less "
                    "than 1, so ask for a lower sparsity or give the layer a lower one"
                )
            wanted[name] = size * (1 - own[name] * scale)
        return _rounded(wanted, sizes, _kept_in_all(sizes, sparsity))

    def overall_sparsity(self, shapes: Shapes) -> float:
        """Return the sparsity of all layers together, at which each has the map's own.

        >>> PerLayer({"a": 0.5, "b": 0.9}).overall_sparsity({"a": (10,), "b": (10, 4)})
        0.82

        Args:
            shapes: Canonical name -> shape of the weight.

        Raises:
            TargetError: If a layer matches no key or several, or a key matches no layer.
        """
        sizes = _sizes(shapes)
        return float(_overall(self._of_layers(sizes), sizes))

    def _of_layers(self, names: Iterable[str]) -> dict[str, Fraction]:
        """Return each layer's sparsity."""
        names = list(names)
        matchers = {key: name_matcher(key) for key, _ in self.sparsities}
        for key, matches in matchers.items():
            if not any(map(matches, names)):
                raise TargetError(f"{key!r} matches none of the layers{nearest(key, _ways_to_say(names))}")
        sparsities: dict[str, Fraction] = {}
        for name in names:
            found = [(key, sparsity) for key, sparsity in self.sparsities if matchers[key](name)]
            if len(found) != 1:
                keys = " and ".join(repr(key) for key, _ in found) or "no key of the map"
                raise TargetError(f"{name} matches {keys}; expected exactly one, so that its sparsity is known")
            sparsities[name] = _as_written(found[0][1])
        return sparsities


Distribution = Global | Uniform | ERK | PerLayer

DISTRIBUTIONS: dict[str, type[Global] | type[Uniform] | type[ERK]] = {"global": Global, "uniform": Uniform, "erk": ERK}
"""Distributions that need no further choice, by the name under which recipes and the command line know them."""


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


def limited(budgets: tuple[Budget, ...], available: Mapping[str, int]) -> tuple[Budget, ...]:
    """Return budgets that ask for no more than there is; what one cannot have goes to those with the most room.

    Rounded counts of layers that are pruned step by step can rise by a weight from one sparsity to a higher one, though
    their sum falls.

    >>> limited((Budget(("a",), 4), Budget(("b",), 2), Budget(("c",), 5)), {"a": 3, "b": 4, "c": 6})
    (Budget(names=('a',), kept=3), Budget(names=('b',), kept=3), Budget(names=('c',), kept=5))

    Args:
        budgets: What a distribution returned.
        available: Canonical name -> weights that may be kept.

    Returns:
        Budgets of the same layers and the same sum; where there is less in all than they ask for, of all there is.
    """
    most = [sum(available[name] for name in budget.names) for budget in budgets]
    kept = [min(budget.kept, limit) for budget, limit in zip(budgets, most, strict=True)]
    surplus = min(sum(budget.kept for budget in budgets), sum(most)) - sum(kept)
    while surplus:
        room = [limit - count for limit, count in zip(most, kept, strict=True)]
        for place in sorted((i for i, free in enumerate(room) if free), key=lambda i: -room[i])[:surplus]:  # stable
            kept[place] += 1
            surplus -= 1
    return tuple(Budget(budget.names, count) for budget, count in zip(budgets, kept, strict=True))


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _kept_in_all(sizes: Mapping[str, int], sparsity: float) -> int:
    total = sum(sizes.values())
    return total - round(sparsity * total)


def _as_written(sparsity: float) -> Fraction:
    """Return 9/10 for 0.9, which as a float is a little more: what ties on paper has to tie here."""
    return Fraction(repr(float(sparsity)))


def _overall(sparsities: Mapping[str, Fraction], sizes: Mapping[str, int]) -> Fraction:
    return sum((sparsities[name] * size for name, size in sizes.items()), Fraction()) / max(1, sum(sizes.values()))


def _ways_to_say(names: Iterable[str]) -> list[str]:
    return [way for name in names for way in (name, name.removesuffix(".weight"))]


def _rounded(wanted: Mapping[str, Fraction], sizes: Mapping[str, int], total: int) -> tuple[Budget, ...]:
    """Round to whole weights that sum to ``total``, by largest remainder; ties go to the earlier layer."""
    if total < len(sizes):
        raise SelectionError(
            f"{total} of {sum(sizes.values())} weights are too few for {len(sizes)} layers: each keeps at least 1; "
            "lower the sparsity or exclude layers"
        )
    kept = {name: max(1, math.floor(wanted[name])) for name in sizes}
    while (left := total - sum(kept.values())) > 0:
        open_layers = [name for name in sizes if kept[name] < sizes[name]]
        for name in sorted(open_layers, key=lambda name: kept[name] - wanted[name])[:left]:  # stable
            kept[name] += 1
    while (left := total - sum(kept.values())) < 0:  # where layers were lifted to one weight
        above_one = [name for name in reversed(list(sizes)) if kept[name] > 1]
        for name in sorted(above_one, key=lambda name: wanted[name] - kept[name])[:-left]:
            kept[name] -= 1
    return tuple(Budget((name,), count) for name, count in kept.items())
