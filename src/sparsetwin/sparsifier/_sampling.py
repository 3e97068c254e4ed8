"""Gradients of further batches at the weights as they are, without a trace left in the model."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

GradientPass = Callable[[int], object]
"""Runs forward and backward on the n-th sample batch, the same one every time, adding to ``.grad``."""


def sampled_passes(
    gradient_pass: GradientPass, tensors: Callable[[], Mapping[str, Tensor]]
) -> Callable[[int], Iterator[None]]:
    """Return what does passes one after the other, each with its own gradients, and then puts everything back.

    Args:
        gradient_pass: Does one pass.
        tensors: Returns every parameter and buffer of the model.
    """

    def passes(count: int) -> Iterator[None]:
        parameters = [tensor for tensor in tensors().values() if tensor.requires_grad]
        buffers = [(t, t.clone()) for t in tensors().values() if not isinstance(t, nn.Parameter)]
        gradients = [parameter.grad for parameter in parameters]
        try:
            for index in range(count):
                for parameter in parameters:
                    parameter.grad = None
                with torch.enable_grad():
                    gradient_pass(index)
                yield
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    return passes
