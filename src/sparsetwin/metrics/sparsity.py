"""How many weights are zero, exactly."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sparsetwin._compat import named_weights
from sparsetwin.errors import StateError, TargetError, nearest
from sparsetwin.masking import Masks
from sparsetwin.metrics._counts import count_nonzero


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """One row of `sparsity_table`."""

    name: str  # canonical name of the weight
    size: int  # elements
    kept: int  # elements that the mask keeps; all of them in a dense phase
    nonzero: int  # elements that are not exactly zero

    @property
    def sparsity(self) -> float:
        """Fraction of elements that are exactly zero, whatever the mask says."""
        return 1 - self.nonzero / self.size

    @property
    def kept_zeros(self) -> int:
        """Elements that the mask keeps, or a dense phase has, and that are zero all the same."""
        return self.kept - self.nonzero


def nonzero_counts(model: nn.Module) -> dict[str, int]:
    """Count the elements of every parameter that are not exactly zero.

    >>> layer = nn.Linear(2, 2)
    >>> _ = nn.init.eye_(layer.weight)
    >>> nonzero_counts(layer)["weight"]
    2

    Args:
        model: Any module; of a sharded one every process has to call this.

    Returns:
        Canonical name -> count; tied parameters once.
    """
    return {name: count_nonzero(weight) for name, weight in named_weights(model).items()}


def sparsity_table(model: nn.Module, masks: Masks, target_names: Iterable[str]) -> list[LayerSparsity]:
    """List size, kept weights and non-zeros of every target.

    Args:
        model: Any module.
        masks: Canonical name -> bool, of the weight's shape; a target without a mask is dense.
        target_names: Canonical names, in the order of the rows.

    Raises:
        TargetError: If the model has no parameter of a target's name, or it is empty.
        StateError: If a mask's weight is of another shape.
    """
    weights = named_weights(model)
    rows = []
    for name in target_names:
        if name not in weights or not weights[name].numel():
            raise TargetError(f"the model has no parameter {name!r} with elements{nearest(name, weights)}")
        weight, mask = weights[name], masks.get(name)
        if mask is not None and mask.shape != weight.shape:
            raise StateError(f"the mask of {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
        kept = weight.numel() if mask is None else count_nonzero(mask)
        rows.append(LayerSparsity(name=name, size=weight.numel(), kept=kept, nonzero=count_nonzero(weight)))
    return rows
