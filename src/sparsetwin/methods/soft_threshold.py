"""STR: soft thresholds, one a layer, that are learned with the weights."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.masking import Masks
from sparsetwin.methods._course import Course
from sparsetwin.methods._state import SparseState
from sparsetwin.methods._stored import StoredWeightsMethod
from sparsetwin.schedules import Phase

ThresholdFunction = Literal["sigmoid", "exp"]
"""What makes a threshold of a learned number s: 1 / (1 + exp(-s)), or exp(s)."""


@dataclass(frozen=True, kw_only=True)
class STR(StoredWeightsMethod):
    """Compute with ``sign(w) * max(|w| - g(s), 0)``, where every layer learns its s, and so its sparsity.

    Weight decay pulls s towards 0 and the threshold up. The sparsity is what comes out of the strength of that decay
    and of the initial s; of the schedule's sparsities only being above 0 counts, but for ``exact_final``.

    Raises:
        ConfigError: If a field has a value that is none of its own, or the schedule has no phase to cut in.

    Source: Kusupati et al., ICML 2020, arXiv 2002.03231, and its code RAIVNLab/STR.
    """

    course: ClassVar[Course] = Course(kind="periodic", every=0.8)

    initial: float = -5.0
    """s at the start, the same for every layer."""
    threshold: ThresholdFunction = "sigmoid"
    """g: what makes the threshold of s."""
    threshold_decay: float | None = None
    """Weight decay of s; None takes the optimizer's own."""
    exact_final: bool = False
    """In the schedule's last phase keep exactly as many weights as its sparsity says, without thresholds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold not in get_args(ThresholdFunction):
            raise ConfigError(f"threshold is one of {', '.join(get_args(ThresholdFunction))}, got {self.threshold!r}")
        if not math.isfinite(self.initial):
            raise ConfigError(f"initial is a finite number, got {self.initial!r}")
        if self.threshold_decay is not None and not 0 <= self.threshold_decay < math.inf:
            raise ConfigError(
                f"threshold_decay is a finite number that is not negative, or None; got {self.threshold_decay!r}"
            )
        phases = self.schedule.phases
        learns = any(phase.is_sparse for phase in phases[:-1])
        if self.exact_final and not (phases[-1].is_sparse and learns):
            raise ConfigError(
                "exact_final cuts in the last phase, which has to be sparse, after a sparse phase in which thresholds "
                f"are learned; got {phases[-1]} after {'one' if learns else 'none'}"
            )

    def learned(self, state: SparseState) -> dict[str, Tensor]:
        """Return s of each target."""
        return {
            name: torch.full((), self.initial, dtype=_number(weight), device=weight.device)
            for name, weight in state.weights.items()
        }

    def learned_group(self) -> dict[str, Any]:
        """Return the weight decay of s."""
        return {} if self.threshold_decay is None else {"weight_decay": self.threshold_decay}

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of weights above their thresholds, or at the cut of the exact number of largest ones."""
        if not phase.is_sparse:
            return {}
        if not self._cuts(phase):
            return self._above(state)
        margins = {name: weight.detach().abs() - self._threshold(name, state) for name, weight in state.weights.items()}
        masks = self.largest(state, phase.sparsity, score=margins.__getitem__)
        for name, weight in state.weights.items():
            weight.copy_(torch.where(masks[name], self._soft(name, state), 0))
        return masks

    def before_update(self, state: SparseState) -> None:
        """Give each s its gradient, which follows from that of the effective weights by the chain rule.

        The stored weights' own gradient is the effective ones' where the mask keeps, and is masked already. Of a step
        that a GradScaler skips in part nothing is learned.
        """
        learns = bool(state.masks) and not self._is_cut(state) and not state.others_overflowed()
        for name, s in state.learned.items():
            gradient = state.gradients.get(name)
            s.grad = None  # which makes optimizers leave it alone
            if learns and gradient is not None:
                weight = state.weights[name].detach()
                pulled = torch.where(state.masks[name], weight.sign() * gradient, 0).sum(dtype=s.dtype)
                s.grad = -pulled * self._slope(s.detach())

    def after_update(self, state: SparseState) -> Masks | None:
        """Return the masks of weights above their thresholds, both as the update left them."""
        return None if not state.masks or self._is_cut(state) else self._above(state)

    def project(self, name: str, state: SparseState) -> Tensor:
        """Return the softly thresholded weights; after the cut the kept ones as they are."""
        kept = state.weights[name] if self._is_cut(state) else self._soft(name, state)
        return torch.where(state.masks[name], kept, 0)

    def _cuts(self, phase: Phase) -> bool:
        return self.exact_final and phase.index == len(self.schedule.phases) - 1

    def _is_cut(self, state: SparseState) -> bool:
        return state.phase is not None and self._cuts(state.phase)

    def _threshold(self, name: str, state: SparseState) -> Tensor:
        s = state.learned[name].detach()
        return s.sigmoid() if self.threshold == "sigmoid" else s.exp()

    def _slope(self, s: Tensor) -> Tensor:
        """Return the derivative of g."""
        if self.threshold == "exp":
            return s.exp()
        value = s.sigmoid()
        return value * (1 - value)

    def _above(self, state: SparseState) -> Masks:
        return {name: weight.detach().abs() > self._threshold(name, state) for name, weight in state.weights.items()}

    def _soft(self, name: str, state: SparseState) -> Tensor:
        weight = state.weights[name].detach()
        return weight.sign() * (weight.abs() - self._threshold(name, state)).clamp(min=0)

    def _ranked_sparsities(self) -> set[float]:
        return {self.schedule.phases[-1].sparsity} if self.exact_final else set()


def _number(weight: Tensor) -> torch.dtype:
    """Return a dtype in which a small step changes s: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)
