"""How much the masks of one sparse phase differ from those of another."""

from dataclasses import dataclass

from sparsetwin.errors import StateError
from sparsetwin.masking import Masks
from sparsetwin.metrics._counts import count_nonzero


@dataclass(frozen=True, kw_only=True)
class MaskChange:
    """Counts over all masks together, previous against current."""

    size: int  # weights that have a mask
    kept_before: int  # weights that the previous masks keep
    kept_now: int  # weights that the current masks keep
    kept_both: int  # weights that both keep

    @property
    def new_kept(self) -> int:
        """Weights that came back: kept now, pruned before."""
        return self.kept_now - self.kept_both

    @property
    def new_pruned(self) -> int:
        """Weights that went: pruned now, kept before."""
        return self.kept_before - self.kept_both

    @property
    def hamming(self) -> int:
        """Weights whose mask differs."""
        return self.new_kept + self.new_pruned

    @property
    def intersection_over_union(self) -> float:
        """Weights kept by both over weights kept by either, from 0 to 1; 1.0 if none is kept by either."""
        either = self.kept_both + self.hamming
        return self.kept_both / either if either else 1.0

    @property
    def new_kept_share(self) -> float:
        """Share of the weights kept now that came back, from 0 to 1; 0.0 if none is kept."""
        return self.new_kept / self.kept_now if self.kept_now else 0.0

    @property
    def paper_percentage(self) -> float:
        """The paper's mask change: (Hamming distance - growth of the zeros) / weights * 100; 0.0 without weights.

        At equal sparsity that is the Hamming distance; in general twice the weights that came back.
        """
        return 200 * self.new_kept / self.size if self.size else 0.0


def mask_change(previous: Masks, current: Masks) -> MaskChange:
    """Compare the masks of two sparse phases.

    >>> import torch
    >>> change = mask_change({"w": torch.tensor([True, True, False, False])},
    ...                      {"w": torch.tensor([True, False, True, False])})
    >>> change.hamming, change.new_kept, change.intersection_over_union, change.paper_percentage
    (2, 1, 0.3333333333333333, 50.0)

    Args:
        previous: Canonical name -> bool.
        current: The same names and shapes; both may be empty.

    Raises:
        StateError: If names or shapes differ, such as when one is of a dense phase.

    Source: Peste et al., 2021, arXiv 2106.12379, and its published code.
    """
    if previous.keys() != current.keys():
        only = ", ".join(sorted(previous.keys() ^ current.keys()))
        raise StateError(f"masks are compared name by name, but only one side has: {only}")
    for name, mask in current.items():
        if mask.shape != previous[name].shape:
            shapes = f"{tuple(previous[name].shape)} and {tuple(mask.shape)}"
            raise StateError(f"the masks of {name} have the shapes {shapes}")
    return MaskChange(
        size=sum(mask.numel() for mask in current.values()),
        kept_before=sum(count_nonzero(mask) for mask in previous.values()),
        kept_now=sum(count_nonzero(mask) for mask in current.values()),
        kept_both=sum(count_nonzero(mask & previous[name]) for name, mask in current.items()),
    )
