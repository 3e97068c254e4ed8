"""What drop-and-grow methods share: random first masks, one update of a layer's mask, and which weights ever lived."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparsetwin._compat import total
from sparsetwin.distributions import ERK, Budget, Distribution, check_budgets
from sparsetwin.errors import ConfigError, ScheduleError, UsageError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Method
from sparsetwin.methods._state import SparseState
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.schedules import Phase, Schedule
from sparsetwin.scores import magnitude, random_scores
from sparsetwin.selection import select_masks

Decay = Literal["cosine", "constant"]
"""How the drop fraction goes on from its first value."""

_EXPLORED = "explored"


@dataclass(frozen=True, kw_only=True)
class DropAndGrowMethod(Method):
    """A method that begins with random masks and moves a fraction of each layer's kept weights at every phase.

    Raises:
        ConfigError: If a field has a value that is none of its own.
    """

    distribution: Distribution = ERK()
    """How many weights each layer keeps, for the whole run."""
    drop_fraction: float = 0.3
    """Fraction of a layer's kept weights that the first update drops and grows, in [0, 1]."""
    decay: Decay = "cosine"
    """How the fraction goes on: half a cosine down to 0 where updates end, or constant."""

    def __post_init__(self) -> None:
        if not isinstance(self.distribution, Distribution):
            raise ConfigError(f"expected a distribution such as ERK() or Uniform(), got {self.distribution!r}")
        if not 0 <= self.drop_fraction <= 1:
            raise ConfigError(f"drop_fraction is a fraction of kept weights in [0, 1], got {self.drop_fraction!r}")
        if self.decay not in get_args(Decay):
            raise ConfigError(f"decay is one of {', '.join(get_args(Decay))}, got {self.decay!r}")

    @property
    @abstractmethod
    def decay_steps(self) -> int:
        """Optimizer steps over which a decaying fraction comes down to 0, T_end in the papers."""

    @property
    def draws(self) -> bool:
        """Whether it draws: the first masks are random."""
        return True

    def check(self, state: SparseState) -> None:
        """Refuse a sparsity at which some layer could keep nothing.

        Raises:
            SelectionError: If the budget of a phase is smaller than one weight a layer.
        """
        for sparsity in sorted({phase.sparsity for phase in self.schedule.phases if phase.is_sparse}):
            check_budgets(self.distribution.budgets(state.shapes, sparsity), state.sizes, minimum_kept=1)

    def reset_scope(self, left: Phase, entered: Phase) -> ResetScope:
        """Return that weights which were pruned and are grown begin with fresh optimizer state; no others do."""
        return "returned"

    def fraction_at(self, step: int) -> float:
        """Return the fraction of kept weights that an update at a step drops.

        Args:
            step: Optimizer steps done.

        Source: Evci et al., 2020, arXiv 1911.11134, section 3, for the cosine.
        """
        if self.decay == "constant":
            return self.drop_fraction
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(step / self.decay_steps, 1)))


def random_masks(state: SparseState, distribution: Distribution, *, sparsity: float) -> Masks:
    """Return random masks, drawn from the state's generator.

    Args:
        state: Weights and generator.
        distribution: How many weights each layer keeps.
        sparsity: Fraction in (0, 1).
    """
    seeds = {name: draw_seed(state.generator) for name in state.weights}
    budgets = distribution.budgets(state.shapes, sparsity)
    return select_masks(state.weights, lambda name: random_scores(state.weights[name], seed=seeds[name]), budgets)


def check_one_sparsity(method: Method) -> None:
    """Refuse a schedule other than phases that are all sparse, and equally so.

    Raises:
        ScheduleError: Naming the phase.
    """
    first = method.schedule.phases[0]
    for phase in method.schedule.phases:
        if not phase.is_sparse or phase.sparsity != first.sparsity:
            raise ScheduleError(
                f"{type(method).__name__} keeps one sparsity above 0 from the first step to the last, as "
                f"schedules.periodic makes it; got {phase} after {first}"
            )


def end_of_updates(schedule: Schedule) -> int:
    """Return the step one interval after the last update: ``stop_step`` of `periodic`, in whole intervals.

    Args:
        schedule: Each phase but the first begins with an update; without any update its end is returned.
    """
    if len(schedule.phases) < 2:
        return schedule.total_steps
    before, last = schedule.phases[-2:]
    return last.start + before.steps


def draw_seed(generator: torch.Generator) -> int:
    """Return a seed, with which draws do not depend on device or sharding."""
    return int(torch.randint(2**62, (), generator=generator))


# One update of a layer's mask


@torch.no_grad()
def drop_and_grow(
    weight: Tensor,
    mask: Tensor,
    *,
    grow_score: Tensor,
    fraction: float,
    kept: int | None = None,
    name: str = "weight",
) -> Tensor:
    """Drop the smallest kept weights and grow as many of the best-scored pruned ones.

    Dropped weights count as pruned ones, so that there are always enough to grow, and a dropped weight may come back.

    >>> weight, mask = torch.tensor([5.0, 4.0, 1.0, 0.0, 0.0]), torch.tensor([True, True, True, False, False])
    >>> drop_and_grow(weight, mask, grow_score=torch.tensor([9.0, 9.0, 2.0, 1.0, 3.0]), fraction=0.4)
    tensor([ True,  True, False, False,  True])

    Args:
        weight: Any shape, float; may be a DTensor.
        mask: Of the same shape, bool, before the update.
        grow_score: Of the same shape, float, not -inf; larger is grown. What is kept is not looked at.
        fraction: Of kept weights, in [0, 1]; the number dropped is rounded down.
        kept: Weights that the mask is to keep. If they are less than before, the smallest go for good before the
            fraction is dropped; if they are more, more are grown. By default as many as before.
        name: Of the weight, for messages.

    Returns:
        A mask of exactly ``kept`` weights; of equal magnitudes or scores the earlier in row-major order is kept.

    Raises:
        SelectionError: If a magnitude or score is NaN.

    Source: Evci et al., 2020, arXiv 1911.11134, algorithm 1; the order of ties is ours.
    """
    before = total(mask.count_nonzero())
    kept = before if kept is None else kept
    surviving = _surviving(before, kept=kept, fraction=fraction)
    if surviving == before == kept:
        return mask.clone()
    survivors = _best(name, weight, torch.where(mask, magnitude(weight), -torch.inf), surviving)
    grown = _best(name, weight, torch.where(survivors, -torch.inf, grow_score), kept - surviving)
    return survivors | grown


def reference_drop_and_grow(
    weight: Tensor, mask: Tensor, *, grow_score: Tensor, fraction: float, kept: int | None = None
) -> Tensor:
    """Do what `drop_and_grow` does by sorting single weights: the plain twin that it is tested against."""
    magnitudes, scores, alive = weight.abs().flatten().tolist(), grow_score.flatten().tolist(), mask.flatten().tolist()
    living = [place for place, lives in enumerate(alive) if lives]
    kept = len(living) if kept is None else kept
    staying = sorted(living, key=lambda place: -magnitudes[place])[:kept]  # stable: ties stay in order
    survivors = set(staying[: len(staying) - math.floor(round(fraction * len(staying), 6))])
    others = [place for place in range(len(alive)) if place not in survivors]
    grown = sorted(others, key=lambda place: -scores[place])[: kept - len(survivors)]
    return torch.tensor([place in survivors or place in grown for place in range(len(alive))]).reshape(weight.shape)


def _surviving(before: int, *, kept: int, fraction: float) -> int:
    staying = min(before, kept)
    return staying - math.floor(round(fraction * staying, 6))  # 0.29 of 100 are 29, though as floats a little less


def _best(name: str, weight: Tensor, scores: Tensor, count: int) -> Tensor:
    budget = Budget((name,), count)
    return select_masks({name: weight}, lambda _: scores, [budget], minimum_kept=0)[name]


# In-time over-parameterization: which weights ever lived


def remember_explored(state: SparseState, masks: Masks) -> None:
    """Add masks that come into force to the memory of the weights that ever lived."""
    memory = state.buffers.setdefault(_EXPLORED, {})
    for name, mask in masks.items():
        memory[name] = mask | memory[name] if name in memory else mask.clone()


def exploration(saved: Mapping[str, Any]) -> float:
    """Return the share of weights that were ever kept, R_s of in-time over-parameterization.

    Args:
        saved: What `Sparsifier.state_dict` returned, in training or in a checkpoint, with the method SET or RigL.

    Raises:
        UsageError: If there is no memory of it: the method keeps none, or no step was begun.

    Source: Liu et al., 2021, arXiv 2102.02887, section 3.
    """
    memory = saved.get("buffers", {}).get(_EXPLORED, {})
    if not memory:
        raise UsageError("nothing is known of weights that ever lived; expected Sparsifier.state_dict() of SET or RigL")
    explored = sum(total(mask.count_nonzero()) for mask in memory.values())
    size: int = sum(mask.numel() for mask in memory.values())
    return explored / size
