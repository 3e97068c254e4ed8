"""ST-3: straight-through gradients and a soft threshold that rises with the sparsity."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsetwin.distributions import Budget
from sparsetwin.masking import Masks
from sparsetwin.methods._base import Pass
from sparsetwin.methods._course import Course
from sparsetwin.methods._knob import Knob
from sparsetwin.methods._state import SparseState
from sparsetwin.methods._stored import StoredWeightsMethod, check_every_steps
from sparsetwin.schedules import Phase
from sparsetwin.scores import magnitude

_THRESHOLD, _SCALE = "threshold", "scale"


@dataclass(frozen=True, kw_only=True)
class ST3(StoredWeightsMethod):
    """Compute with softly thresholded, rescaled weights, and give their gradients to all stored ones as they are.

    The threshold lies where as many weights are above it as the phase's sparsity leaves. Every output's weights are
    then scaled up by about what thresholding took from their mean magnitude.

    Source: Vanderschueren & De Vleeschouwer, WACV 2023, arXiv 2212.01076, and its code stthree.
    """

    course: ClassVar[Course] = Course(kind="gradual", start=0.0, stop=0.75, every=0.01)
    knobs: ClassVar[tuple[Knob, ...]] = (Knob("schedule.stop", (0.5, 0.75, 0.9), "run"),)

    rescale: bool = True
    """Scale each output's weights up, so that their mean magnitude stays about what it was without the mask."""
    sigma: bool = False
    """ST-3 sigma: rank magnitudes times the square root of the sum of a weight's dimensions, which evens layers out."""
    every_steps: int = 1
    """Steps between new thresholds, masks and scales."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_every_steps(self.every_steps)

    def enter(self, phase: Phase, state: SparseState) -> Masks:
        """Return the masks of weights above the threshold of the phase's sparsity."""
        if not phase.is_sparse:
            state.buffers.pop(_THRESHOLD, None)
            state.buffers.pop(_SCALE, None)
            return {}
        return self._chosen(phase, state)

    def gradient_masks(self, state: SparseState) -> Masks:
        """Return no masks: gradients go straight through to every weight."""
        return {}

    def after_update(self, state: SparseState) -> Masks | None:
        """Every so many steps choose thresholds, masks and scales anew."""
        if state.phase is None or not state.masks or (state.steps + 1 - state.phase.start) % self.every_steps:
            return None
        return self._chosen(state.phase, state)

    def project(self, name: str, state: SparseState) -> Tensor:
        """Return the weights that the network computes with."""
        weight = state.weights[name].detach()
        soft = weight.sign() * (weight.abs() - state.buffers[_THRESHOLD][name]).clamp(min=0)
        if self.rescale:
            soft *= state.buffers[_SCALE][name]
        return torch.where(state.masks[name], soft, 0)

    def make_buffers(self, phase: Phase, state: SparseState) -> None:
        """Make thresholds and scales exist in a sparse phase."""
        if phase.is_sparse:
            self._remember(state, torch.zeros(len(state.weights)).unbind(), state.masks)

    def passes(self, phase: Phase, *, enters: bool) -> tuple[Pass, ...]:
        """Forward and the inputs' gradients with kept weights, the gradients of all weights."""
        return (Pass(weight_gradient="all"),)

    def _chosen(self, phase: Phase, state: SparseState) -> Masks:
        masks = self.largest(state, phase.sparsity, score=lambda name: self._score(name, state))
        thresholds: dict[str, Tensor] = {}
        for budget in self.distribution.budgets(state.shapes, phase.sparsity):
            scores = {name: self._score(name, state) for name in budget.names}
            cuts = _cuts(scores, masks, budget, phase.sparsity)
            units = [self._unit(state.weights[name]) for name in scores]
            thresholds |= {name: cut.double() * unit for name, cut, unit in zip(scores, cuts, units, strict=True)}
        self._remember(state, [thresholds[name] for name in state.weights], masks)
        return masks

    def _score(self, name: str, state: SparseState) -> Tensor:
        weight = state.weights[name]
        return magnitude(weight) / self._unit(weight) if self.sigma else magnitude(weight)

    def _unit(self, weight: Tensor) -> float:
        """Return in what a layer's magnitudes are counted: with sigma in 1 / sqrt(the sum of its dimensions)."""
        return 1 / math.sqrt(sum(weight.shape)) if self.sigma else 1.0

    def _remember(self, state: SparseState, thresholds: list[Tensor] | tuple[Tensor, ...], masks: Masks) -> None:
        state.buffers[_THRESHOLD] = {
            name: threshold.to(weight).reshape([1] * weight.ndim)
            for (name, weight), threshold in zip(state.weights.items(), thresholds, strict=True)
        }
        if self.rescale:
            state.buffers[_SCALE] = {name: _scale(weight, masks[name]) for name, weight in state.weights.items()}


def _cuts(scores: dict[str, Tensor], masks: Masks, budget: Budget, sparsity: float) -> Tensor:
    """Return the threshold of each layer of a budget: between the largest pruned and the smallest kept score."""
    outside = torch.stack([torch.where(masks[name], 0, score).amax() for name, score in scores.items()])
    inside = torch.stack([torch.where(masks[name], score, torch.inf).amin() for name, score in scores.items()])
    size = sum(score.numel() for score in scores.values())
    largest = outside.amax()
    # A layer that keeps its minimum of smaller weights has a threshold of its own
    smallest = torch.where(inside >= largest, inside, torch.inf).amin()
    smallest = torch.where(smallest.isinf(), largest, smallest)
    cut = largest + (smallest - largest) * _place(size, size - budget.kept, sparsity)
    return torch.where(cut <= inside, cut, outside)


def _place(size: int, pruned: int, sparsity: float) -> float:
    """Return where between two scores the sparsity's quantile lies, as linear interpolation has it: from 0 to below 1.

    Where the quantile lies between other scores, because it does not fit the exact count, ``1 - sparsity`` is taken,
    which is its place wherever it fits.
    """
    if not pruned:
        return 0.0
    place = (size - 1) * sparsity - (pruned - 1)
    return place if 0 <= place < 1 else 1 - sparsity


def _scale(weight: Tensor, mask: Tensor) -> Tensor:
    """Return by what each output's weights are scaled: (outputs, 1, ...), about 1 where all are kept."""
    sizes = weight.detach().abs()
    axes = tuple(range(1, weight.ndim))
    kept, everything = torch.where(mask, sizes, 0), sizes
    if axes:
        kept, everything = kept.mean(axes, keepdim=True), everything.mean(axes, keepdim=True)
    share = (kept + 1e-6) / (everything + 1e-6)
    return 1.01 / (share + 0.01)
