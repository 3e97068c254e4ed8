"""AC/DC: alternating compressed/decompressed training."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from sparsetwin._compat import local
from sparsetwin.errors import ConfigError
from sparsetwin.masking import Masks
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._ranking import RankingMethod
from sparsetwin.methods._state import SparseState
from sparsetwin.optimizer_state import ResetScope
from sparsetwin.schedules import Phase

Rescale = Literal["none", "l1", "l2"]
"""Which norm of a layer's weights pruning leaves as it was."""


@dataclass(frozen=True, kw_only=True)
class ACDC(RankingMethod):
    """Alternate dense phases with sparse phases in which only the largest weights live.

    On entering a sparse phase the weights of largest magnitude are chosen anew, with no memory of earlier masks, and
    the others become zero; the mask holds for the phase. On entering a dense phase every weight is free again: the
    pruned ones start from zero, and the optimizer's state goes back to its initial values, since it is stale for them.
    Sparse phases that follow each other are a ramp: of the weights that live, ever fewer are kept.

    Raises:
        ConfigError: If a field has a value that is none of its own.

    Source: Peste, Iofinova, Vladu & Alistarh, 2021, arXiv 2106.12379, algorithm 1.
    """

    knobs: ClassVar[tuple[Knob, ...]] = (Knob("method.reset", ("all", "none")),)

    reset: ResetScope = "all"
    """Whose optimizer state is restored on entering a dense phase after a sparse one."""
    rescale: Rescale = "none"
    """On entering a sparse phase, scale each layer's kept weights so that the layer's l1 or l2 norm stays as it was."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reset not in get_args(ResetScope):
            raise ConfigError(f"reset is one of {', '.join(get_args(ResetScope))}, got {self.reset!r}")
        if self.rescale not in get_args(Rescale):
            raise ConfigError(f"rescale is one of {', '.join(get_args(Rescale))}, got {self.rescale!r}")

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of the largest weights in a sparse phase, none in a dense one."""
        if not phase.is_sparse:
            state.buffers.pop(self.score, None)  # a score that remembers does so within one dense phase
            return {}
        is_ramp = bool(state.masks) and phase.sparsity >= self.schedule.phases[phase.index - 1].sparsity
        masks = self.best(phase, state, among=state.masks if is_ramp else None)
        if self.rescale != "none":
            for name, weight in state.weights.items():
                _keep_norm_(weight, masks[name], 1 if self.rescale == "l1" else 2)
        return masks

    def reset_scope(self, left: Phase, entered: Phase) -> ResetScope:
        """Return ``reset`` where weights come back, nobody elsewhere."""
        return self.reset if left.is_sparse and not entered.is_sparse else "none"


def _keep_norm_(weight: Tensor, mask: Tensor, order: int) -> None:
    """Scale a weight so that what the mask keeps has the norm that all of it had."""
    powers = weight.detach().double().abs().pow(order)
    before, after = powers.sum(), (powers * mask).sum()
    factor = (_whole(before) / _whole(after)) ** (1 / order) if _whole(after) > 0 else 1.0
    local(weight.detach()).mul_(factor)


def _whole(value: Tensor) -> float:
    gather = getattr(value, "full_tensor", None)
    return float(value if gather is None else gather())
