"""AC/DC: alternating compressed/decompressed training."""

from dataclasses import dataclass
from typing import get_args

from sparsetwin.distributions import Distribution, Global, check_budgets
from sparsetwin.errors import ConfigError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Method, SparseState
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.patterns import Pattern, Unstructured
from sparsetwin.schedules import Phase
from sparsetwin.scores import score_named
from sparsetwin.selection import select_masks


@dataclass(frozen=True, kw_only=True)
class ACDC(Method):
    """Alternate dense phases with sparse phases in which only the largest weights live.

    On entering a sparse phase the weights of largest magnitude are chosen anew, with no memory of earlier masks, and
    the others become zero; the mask holds for the phase. On entering a dense phase every weight is free again: the
    pruned ones start from zero, and the optimizer's state goes back to its initial values, since it is stale for them.

    Raises:
        ConfigError: If a field has a value that is none of its own.

    Source: Peste, Iofinova, Vladu & Alistarh, 2021, arXiv 2106.12379, algorithm 1.
    """

    distribution: Distribution = Global()
    """`Global` ranks all layers together; `Uniform` gives every layer the same sparsity."""
    score: str = "magnitude"
    """What a weight is worth, by its name in `sparsetwin.scores.SCORES`."""
    pattern: Pattern = Unstructured()
    """Which weights live and die together."""
    minimum_kept: int = 1
    """Weights that every layer keeps, taken out of the global budget."""
    reset: ResetScope = "all"
    """Whose optimizer state is restored on entering a dense phase after a sparse one."""

    def __post_init__(self) -> None:
        score_named(self.score)
        if not isinstance(self.distribution, Distribution) or not isinstance(self.pattern, Pattern):
            raise ConfigError(
                "expected a distribution such as Global() or Uniform() and a pattern such as Unstructured(), "
                f"got {self.distribution!r} and {self.pattern!r}"
            )
        if self.reset not in get_args(ResetScope):
            raise ConfigError(f"reset is one of {', '.join(get_args(ResetScope))}, got {self.reset!r}")
        if self.minimum_kept < 1:
            raise ConfigError(
                f"minimum_kept is at least 1, since an empty layer stops training; got {self.minimum_kept}"
            )

    def check(self, state: SparseState) -> None:
        """Refuse a sparsity at which some layer could keep nothing.

        Raises:
            SelectionError: If the budget of a phase is smaller than the layers' minimum.
        """
        for sparsity in sorted({phase.sparsity for phase in self.schedule.phases if phase.is_sparse}):
            budgets = self.distribution.budgets(state.sizes, sparsity)
            check_budgets(budgets, state.sizes, minimum_kept=self.minimum_kept)

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of the largest weights in a sparse phase, none in a dense one."""
        if not phase.is_sparse:
            return {}
        score = score_named(self.score)
        budgets = self.distribution.budgets(state.sizes, phase.sparsity)
        return select_masks(
            state.weights, lambda name: score(state.weights[name]), budgets, minimum_kept=self.minimum_kept
        )

    def reset_scope(self, left: Phase, entered: Phase) -> ResetScope:
        """Return ``reset`` where weights come back, nobody elsewhere."""
        return self.reset if left.is_sparse and not entered.is_sparse else "none"
