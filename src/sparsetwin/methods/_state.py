"""What a method may read and remember while a model trains."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.errors import UsageError
from sparsetwin.masking import Masks
from sparsetwin.schedules import Phase

STORED = "stored"
"""Name of the buffers that hold the weights of methods whose parameters hold something else between steps."""


def _nothing() -> None:
    pass


def _no() -> bool:
    return False


@dataclass(kw_only=True)
class SparseState:
    """What a method may read and remember. Its tensors are the live ones: change a weight only where a rule says so."""

    weights: Mapping[str, Tensor]  # targets by canonical name, in the model's order
    masks: Masks = field(default_factory=dict)  # of the phase in force; on entering, of the phase that ends
    buffers: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what -> canonical name -> tensor; is saved
    learned: dict[str, nn.Parameter] = field(default_factory=dict)  # by target; what `Method.learned` began; is saved
    generator: torch.Generator = field(default_factory=torch.Generator)  # for methods that draw; is saved
    steps: int = 0  # optimizer steps done
    phase: Phase | None = None  # in force; on entering, the one that ends
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # every parameter and buffer of the model
    groups_of: Callable[[], Mapping[str, Mapping[str, Any]]] = dict  # parameter -> its optimizer's parameter group
    gradient_passes: Callable[[int], Iterator[None]] | None = None  # see `sample_gradients`
    unscale_gradients: Callable[[], None] = _nothing  # for `before_update`, before it adds anything to gradients: a
    # GradScaler leaves those of a fused optimizer scaled until its update
    others_overflowed: Callable[[], bool] = _no  # for `before_update`, before it remembers gradients: whether those of
    # another optimizer are not finite, so that a GradScaler skips its update; it waits for the device
    gradient_scale: float | None = None  # in `Method.backward`: by what a GradScaler multiplies gradients, if one does

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the targets that have one; there are some between backward and update only."""
        return {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Every parameter that is trained, targets included, by canonical name."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    @property
    def groups(self) -> Mapping[str, Mapping[str, Any]]:
        """The optimizer's parameter group of each parameter, as it is now: learning rate, weight decay and so on."""
        return self.groups_of()

    @property
    def stored(self) -> dict[str, Tensor]:
        """Stored weights, where parameters hold the effective ones between steps; empty in dense phases."""
        return self.buffers.get(STORED, {})

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each target."""
        return {name: weight.numel() for name, weight in self.weights.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each target."""
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def sample_gradients(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Yield the targets' gradients on ``count`` batches, one after the other, at the weights as they are.

        Gradients that the step has accumulated are put back at the end, and so are batch-norm statistics.

        Raises:
            UsageError: If the `Sparsifier` was given no ``gradient_pass``.
        """
        if self.gradient_passes is None:
            raise UsageError("this method samples gradients; give Sparsifier(..., gradient_pass=) a function that does")
        for _ in self.gradient_passes(count):
            yield self.gradients
