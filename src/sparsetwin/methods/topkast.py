"""Top-KAST: forward with the largest weights, update a few more."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsetwin._compat import local
from sparsetwin.distributions import Distribution, Uniform
from sparsetwin.errors import ConfigError
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Pass
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._state import SparseState
from sparsetwin.methods._stored import StoredWeightsMethod, check_every_steps
from sparsetwin.schedules import Phase

_UPDATED = "updated"


@dataclass(frozen=True, kw_only=True)
class TopKAST(StoredWeightsMethod):
    """Compute with the largest weights (set A), and update the largest of a wider set (B) with their gradients.

    A weight of B outside A is zero for the network, yet trains, and enters A once it is large enough. Weights outside B
    keep their values to the bit. B is regularised, so that A does not freeze: see ``exploration``.

    Raises:
        ConfigError: If a field has a value that is none of its own, or a phase is less sparse than B.

    Source: Jayakumar et al., NeurIPS 2020, arXiv 2106.03517.
    """

    course: ClassVar[Course] = Course(kind="constant")
    serves_sharded: ClassVar[bool] = True
    knobs: ClassVar[tuple[Knob, ...]] = (
        Knob("method.options.backward_sparsity", (0.0, 0.5, 0.8)),
        Knob("optimizer.weight_decay", (1.0, 0.0, 0.25), "own"),  # 0: the exploration penalty is all there is
    )

    distribution: Distribution = Uniform()
    """`Uniform` takes the largest of each layer; `Global` ranks all layers together."""
    backward_sparsity: float = 0.5
    """1 minus the density of B: the fraction of weights that are not updated. 0 updates all."""
    exploration: float = 1e-4
    """Strength of the L2 penalty that is added to the loss: as it is on A, divided by A's density on the rest of B."""
    every_steps: int = 1
    """Steps between new choices of A and B."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_every_steps(self.every_steps)
        if not 0 <= self.backward_sparsity < 1:
            raise ConfigError(f"backward_sparsity is a fraction in [0, 1), got {self.backward_sparsity!r}")
        if not 0 <= self.exploration < math.inf:
            raise ConfigError(f"exploration is a finite number that is not negative, got {self.exploration!r}")
        for phase in self.schedule.phases:
            if phase.is_sparse and phase.sparsity < self.backward_sparsity:
                raise ConfigError(
                    f"more weights are updated than computed with, so backward_sparsity = {self.backward_sparsity} "
                    f"may not exceed the sparsity of any sparse phase; got {phase}"
                )

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of A, and remember B."""
        if not phase.is_sparse:
            state.buffers.pop(_UPDATED, None)
            return {}
        return self._chosen(phase, state)

    def gradient_masks(self, state: SparseState) -> Masks:
        """Return the masks of B."""
        return state.buffers.get(_UPDATED, {})

    def before_update(self, state: SparseState) -> None:
        """Add the gradient of the exploration penalty to those of B."""
        if state.phase is None or not state.masks or not self.exploration:
            return
        state.unscale_gradients()
        density = 1 - state.phase.sparsity
        for name, gradient in state.gradients.items():
            weight, used, updated = (
                local(tensor) for tensor in (state.weights[name], state.masks[name], state.buffers[_UPDATED][name])
            )
            penalty = torch.where(used, self.exploration * weight, self.exploration / density * weight)
            local(gradient).add_(torch.where(updated, penalty, 0))

    def after_update(self, state: SparseState) -> Masks | None:
        """Take back what momentum and weight decay did outside B; every so many steps choose A and B anew."""
        if state.phase is None or not state.masks:
            return None
        for name, weight in state.weights.items():
            updated, before = local(state.buffers[_UPDATED][name]), local(state.stored[name])
            plain = local(weight.detach())
            plain.copy_(torch.where(updated, plain, before))
        if (state.steps + 1 - state.phase.start) % self.every_steps:
            return None
        return self._chosen(state.phase, state)

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make B exist in a sparse phase."""
        if phase.is_sparse:
            state.buffers[_UPDATED] = {name: torch.ones_like(mask) for name, mask in state.masks.items()}

    def passes(self, phase: Phase, *, enters: bool) -> tuple[Pass, ...]:
        """Forward and the inputs' gradients with A, the weights' gradients of B."""
        return (Pass(weight_gradient="updated"),)

    def _chosen(self, phase: Phase, state: SparseState) -> Masks:
        used, updated = self.largest(state, phase.sparsity), self.largest(state, self.backward_sparsity)
        # Rounding of two layers' counts may leave a weight of A out of B
        state.buffers[_UPDATED] = {name: mask | used[name] for name, mask in updated.items()}
        return used

    def _ranked_sparsities(self) -> set[float]:
        return super()._ranked_sparsities() | {self.backward_sparsity}
