"""The targets around an update: gradients masked before it, weights masked, or stored and projected, after it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsetwin._compat import local
from sparsetwin.masking import apply_masks_
from sparsetwin.methods import STORED, Method, SparseState
from sparsetwin.sparsifier._masks import MaskWords


class TargetWeights:
    """What the hooks do to targets and their gradients.

    A method that stores weights has parameters that hold what `Method.project` makes of them between steps, and so has
    every method while its weights are quantized. For the update alone the stored weights come back into the parameters.

    Args:
        method: Says how gradients are masked and weights projected.
        state: Targets and masks.
    """

    def __init__(self, method: Method, state: SparseState) -> None:
        self._method = method
        self._state = state
        self._words = MaskWords()
        self._projects = type(method).project is not Method.project
        self._masks_own_gradients = type(method).gradient_masks is not Method.gradient_masks
        self._first_quantized = method.first_quantized

    @property
    def settle_together(self) -> bool:
        """Whether weights are settled once, after the last of several optimizers, and not one optimizer's at a time."""
        return self._stores_at(self._state.steps)

    def _stores_at(self, step: int) -> bool:
        return self._method.stores_weights or step >= self._first_quantized

    def take_masks(self) -> None:
        """Take the masks of the state, which have changed."""
        self._words.fill(self._state.masks, self._state.weights)

    def mask_gradients(self, names: Iterable[str]) -> None:
        """Set the gradients of weights that are not to be updated to zero; in dense phases do nothing."""
        if not self._state.masks:
            return
        gradients = {name: self._state.weights[name].grad for name in names}
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if self._masks_own_gradients:
            masks = self._method.gradient_masks(self._state)
            apply_masks_(present, {name: masks[name] for name in present if name in masks})
        else:
            for name, gradient in present.items():
                self._words.keep_(gradient, name)

    @torch.no_grad()
    def bring_back(self) -> None:
        """Put the stored weights, if there are any, into the parameters."""
        for name, stored in self._state.stored.items():
            local(_plain(self._state.weights[name])).copy_(local(stored))

    @torch.no_grad()
    def begin_quantizing(self) -> None:
        """Store the weights and round those in the parameters, at the step from which on they are quantized."""
        has_begun = self._state.stored and not self._method.stores_weights
        if self._state.steps == self._first_quantized and not has_begun:
            self.bring_back()
            self.store()
            self.settle(self._state.masks)

    @torch.no_grad()
    def store(self, *, done: int = 0) -> None:
        """Store the weights as the parameters hold them, if they are stored in this step and the phase is sparse.

        Args:
            done: Steps to look back: 1 to store what the step before has stored already.
        """
        if not self._stores_at(self._state.steps - done):
            return
        if not self._state.masks:
            self._state.buffers.pop(STORED, None)
            return
        stored = self._state.buffers.setdefault(STORED, {})
        for name, weight in self._state.weights.items():
            if not self._method.stores_weights:
                self._allow(name)
            if name in stored:
                local(stored[name]).copy_(local(_plain(weight)))
            else:
                stored[name] = _plain(weight).clone()

    @torch.no_grad()
    def settle(self, names: Iterable[str]) -> None:
        """Leave in the parameters what the sparse phase allows; in dense phases do nothing."""
        if self._state.masks:
            self._words.note_capture()
        quantization = self._method.quantization if self._state.steps >= self._first_quantized else None
        for name in names if self._state.masks else ():
            if quantization is None or self._method.stores_weights:  # if not, what was stored is allowed already
                self._allow(name)
            if quantization is not None:
                weight = _plain(self._state.weights[name])
                quantization.round_({name: weight})
                self._words.keep_(weight, name)  # of an output with NaN, which rounding spreads

    def _allow(self, name: str) -> None:
        """Leave in a parameter what the masks, or the method's own rule, make of the weights in it."""
        weight = _plain(self._state.weights[name])
        if self._projects:
            weight.copy_(self._method.project(name, self._state))
        else:
            self._words.keep_(weight, name)


def _plain(weight: Tensor) -> Tensor:
    return weight.detach()
