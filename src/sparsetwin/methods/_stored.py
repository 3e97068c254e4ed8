"""What methods share whose parameters hold effective weights, while the stored ones train."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsetwin._compat import is_sharded
from sparsetwin.distributions import Distribution, Global, check_budgets
from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Method
from sparsetwin.methods._state import SparseState
from sparsetwin.scores import magnitude
from sparsetwin.selection import select_masks


@dataclass(frozen=True, kw_only=True)
class StoredWeightsMethod(Method):
    """A method that trains weights which the network does not compute with.

    In sparse phases parameters hold the effective weights between steps; the `Sparsifier` holds the stored ones, which
    come back for each update. In dense phases nothing is stored.

    Raises:
        ConfigError: If a field has a value that is none of its own.
    """

    stores_weights: ClassVar[bool] = True
    serves_sharded: ClassVar[bool] = False  # whether weights may be DTensors

    distribution: Distribution = Global()
    """`Global` ranks all layers together; `Uniform`, `ERK` and `PerLayer` give each layer its own sparsity."""
    minimum_kept: int = 1
    """Weights that every layer keeps, taken out of the global budget."""

    def __post_init__(self) -> None:
        if not isinstance(self.distribution, Distribution):
            raise ConfigError(f"expected a distribution such as Global() or Uniform(), got {self.distribution!r}")
        if self.minimum_kept < 1:
            raise ConfigError(
                f"minimum_kept is at least 1, since an empty layer stops training; got {self.minimum_kept}"
            )

    def check(self, state: SparseState) -> None:
        """Refuse a sparsity at which some layer could keep nothing.

        Raises:
            SelectionError: If the budget of a phase is smaller than the layers' minimum.
            UsageError: If weights are sharded, and the method cannot serve them.
        """
        sharded = [name for name, weight in state.weights.items() if is_sharded(weight)]
        if sharded and not self.serves_sharded:
            raise UsageError(
                f"{type(self).__name__} cannot train sharded weights (DTensor) such as {sharded[0]}; "
                "use DistributedDataParallel, which leaves weights whole"
            )
        for sparsity in self._ranked_sparsities():
            budgets = self.distribution.budgets(state.shapes, sparsity)
            check_budgets(budgets, state.sizes, minimum_kept=self.minimum_kept)

    def _ranked_sparsities(self) -> set[float]:
        """Return the sparsities at which weights are ranked."""
        return {phase.sparsity for phase in self.schedule.phases if phase.is_sparse}

    def largest(self, state: SparseState, sparsity: float, *, score: Callable[[str], Tensor] | None = None) -> Masks:
        """Return masks of the weights of largest score, by default of largest magnitude.

        Args:
            state: Its weights are the stored ones, on entering a phase and after an update.
            sparsity: Fraction that is pruned, spread over layers by ``distribution``.
            score: Canonical name -> scores of the weight's shape; None is magnitude.
        """
        return select_masks(
            state.weights,
            score or (lambda name: magnitude(state.weights[name])),
            self.distribution.budgets(state.shapes, sparsity),
            minimum_kept=self.minimum_kept,
        )


def check_every_steps(every_steps: int) -> None:
    """Refuse what is no number of steps.

    Raises:
        ConfigError: If it is less than 1.
    """
    if not isinstance(every_steps, int) or isinstance(every_steps, bool) or every_steps < 1:
        raise ConfigError(f"every_steps is a whole number of steps, at least 1; got {every_steps!r}")
