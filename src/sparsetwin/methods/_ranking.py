"""What methods share that rank weights: a score, a distribution, a pattern."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetwin._compat import total
from sparsetwin.distributions import Budget, Distribution, Global, check_budgets, limited
from sparsetwin.errors import ConfigError
from sparsetwin.grouped_selection import check_groups
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Method
from sparsetwin.methods._state import SparseState
from sparsetwin.patterns import Block, Channel, Pattern, Unstructured, check_pattern, pattern_at
from sparsetwin.schedules import Phase
from sparsetwin.scores import random_scores, score_named
from sparsetwin.selection import select_masks


@dataclass(frozen=True, kw_only=True)
class RankingMethod(Method):
    """A method that keeps the best-scored weights.

    Raises:
        ConfigError: If a field has a value that is none of its own.
    """

    distribution: Distribution = Global()
    """`Global` ranks all layers together; `Uniform`, `ERK` and `PerLayer` give each layer its own sparsity."""
    score: str = "magnitude"
    """What a weight is worth, by its name in `sparsetwin.scores.SCORES`."""
    pattern: Pattern = Unstructured()
    """Which weights live and die together."""
    minimum_kept: int = 1
    """Weights that every layer keeps, taken out of the global budget."""

    def __post_init__(self) -> None:
        score_named(self.score)
        if not isinstance(self.distribution, Distribution) or not isinstance(self.pattern, Pattern):
            raise ConfigError(
                "expected a distribution such as Global() or Uniform() and a pattern such as Unstructured(), "
                f"got {self.distribution!r} and {self.pattern!r}"
            )
        if self.minimum_kept < 1:
            raise ConfigError(
                f"minimum_kept is at least 1, since an empty layer stops training; got {self.minimum_kept}"
            )

    @property
    def draws(self) -> bool:
        """Whether scores are drawn at random."""
        return score_named(self.score).draws

    def needs_gradients(self, phase: Phase) -> bool:
        """Whether the score is one of gradients, and weights are ranked for the phase."""
        return phase.is_sparse and score_named(self.score).needs_gradients

    def check(self, state: SparseState) -> None:
        """Refuse a sparsity at which some layer could keep nothing, or that the pattern does not have.

        Raises:
            SelectionError: If the budget of a phase is smaller than the layers' minimum.
            ConfigError: If there is nothing to remember yet when weights are first ranked, or the last sparse phase
                keeps more than the pattern.
        """
        score, first = score_named(self.score), self.schedule.phases[0]
        if score.remember_ is not None and first.is_sparse:
            raise ConfigError(
                f"the score {self.score!r} is remembered from step to step, so the first phase cannot be sparse; "
                f"begin with a dense one, or rank by 'magnitude' or 'sensitivity'; got {first}"
            )
        for sparsity in sorted({phase.sparsity for phase in self.schedule.phases if phase.is_sparse}):
            check_pattern(self.pattern, state.shapes, sparsity)
            budgets = self.distribution.budgets(state.shapes, sparsity)
            check_budgets(budgets, state.sizes, minimum_kept=self.minimum_kept)
            pattern = pattern_at(self.pattern, sparsity)
            check_groups(budgets, state.shapes, pattern=pattern, minimum_kept=self.minimum_kept)
        final = self.schedule.final_sparsity
        if final and (reached := pattern_at(self.pattern, final)) != self.pattern:
            raise ConfigError(
                f"the last sparse phase has a sparsity of {final!r}, at which the pattern is {reached}; let it have "
                f"that of {self.pattern}, or give the other as the pattern"
            )

    def before_update(self, state: SparseState) -> None:
        """Bring up to date what the score remembers, where the masks let a gradient through."""
        remember_ = score_named(self.score).remember_
        if remember_ is None:
            return
        self._make_memory(state)
        if state.others_overflowed():
            return
        state.unscale_gradients()
        gradients = state.gradients
        for name, memory in state.buffers[self.score].items():
            if name in gradients:
                remember_(memory, state.weights[name], gradients[name])

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make what the score remembers."""
        if score_named(self.score).remember_ is not None:
            self._make_memory(state)

    def _make_memory(self, state: SparseState) -> None:
        memory = state.buffers.setdefault(self.score, {})
        for name, weight in state.weights.items():
            if name not in memory:
                memory[name] = torch.zeros_like(weight, requires_grad=False)

    def best(self, phase: Phase, state: SparseState, *, among: Masks | None = None) -> Masks:
        """Return masks of the best-scored weights, as many as the phase's sparsity leaves.

        What the score remembered is used up: it is remembered anew from here on.

        Args:
            phase: Gives the sparsity.
            state: Weights, gradients, memory and generator.
            among: Masks of the weights that may be kept, at a sparsity that is not lower; None or empty means all.
        """
        among = among or {}
        budgets = self.distribution.budgets(state.shapes, phase.sparsity)
        masks = select_masks(
            state.weights,
            _among(self._scores(state), among),
            budgets_among(budgets, among) if isinstance(self.pattern, Unstructured) else budgets,
            minimum_kept=self.minimum_kept,
            pattern=pattern_at(self.pattern, phase.sparsity),
        )
        state.buffers.pop(self.score, None)
        if among and isinstance(self.pattern, (Block, Channel)):
            # What lives can come less near to the budget than one small dead group more would
            masks = {name: mask & among[name] for name, mask in masks.items()}
        return masks

    def _scores(self, state: SparseState) -> Callable[[str], Tensor]:
        score = score_named(self.score)
        if score.draws:
            seeds = {name: _draw_seed(state.generator) for name in state.weights}
            return lambda name: random_scores(state.weights[name], seed=seeds[name])
        evidence = state.gradients if score.needs_gradients else state.buffers.get(self.score, {})
        if score.needs_gradients:
            check_gradients(evidence, state)
        return lambda name: score.of(state.weights[name], evidence.get(name))


def check_gradients(gradients: Mapping[str, Tensor], state: SparseState) -> None:
    """Refuse targets whose weights cannot be ranked by gradients.

    Raises:
        ConfigError: Naming the first target without a gradient.
    """
    missing = [name for name in state.weights if name not in gradients]
    if missing:
        raise ConfigError(f"{missing[0]} has no gradient to rank its weights by; exclude it from the targets")


def budgets_among(budgets: tuple[Budget, ...], masks: Masks) -> tuple[Budget, ...]:
    """Return budgets of which no layer's is more than its living weights, so that no pruned one has to fill it.

    Args:
        budgets: What a distribution returned for a sparsity that is not lower than the masks'.
        masks: Of the weights that live; empty if all do.
    """
    if not masks or len(budgets) == 1:  # one count for all layers does not rise with the sparsity
        return budgets
    return limited(budgets, {name: total(mask.count_nonzero()) for name, mask in masks.items()})


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _among(scores: Callable[[str], Tensor], masks: Masks) -> Callable[[str], Tensor]:
    """Return scores of which those outside the masks are less than any inside."""
    if not masks:
        return scores
    return lambda name: torch.where(masks[name], scores(name), -torch.inf)
