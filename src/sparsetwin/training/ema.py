"""An average of the weights within a phase.

An average that runs across a phase boundary mixes weights of different masks: after 500 steps at decay 0.999 the
average of a 90% sparse model is not sparse at all. So it starts anew when a phase begins.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin._compat import named_weights
from sparsetwin.masking import Masks, apply_masks_


class PhaseAverage:
    """An exponential moving average of a model's parameters; buffers are copied.

    Args:
        model: The model that is trained.
        decay: Weight of the past, 0 < decay < 1.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._model = model
        self.decay = decay
        self.average = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the model as it is."""
        self._copy(list(self._model.parameters()), list(self.average.parameters()))
        self._copy(list(self._model.buffers()), list(self.average.buffers()))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model after an optimizer step."""
        averages: list[Tensor] = [parameter for parameter in self.average.parameters() if parameter.is_floating_point()]
        current = [parameter.detach() for parameter in self._model.parameters() if parameter.is_floating_point()]
        torch._foreach_lerp_(averages, current, 1 - self.decay)
        self._copy(list(self._model.buffers()), list(self.average.buffers()))

    def masked(self, masks: Masks) -> nn.Module:
        """Return the average with its pruned weights set to zero, for evaluation and saving."""
        apply_masks_(named_weights(self.average), masks)
        return self.average

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged model's state."""
        state: dict[str, Tensor] = self.average.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.average.load_state_dict(state)

    @staticmethod
    def _copy(source: list[Any], target: list[Any]) -> None:
        for new, old in zip(source, target, strict=True):
            old.copy_(new)
