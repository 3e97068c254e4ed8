"""What exporters share of a network: example inputs, tracing in evaluation mode, and the outputs to compare with."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sparsetwin.errors import ExportError

Example: TypeAlias = Tensor | tuple[Tensor, ...]
"""One input of a model, or all of them; the first axis of each is the batch."""

TRACEABLE = "torch.export has to trace it: its forward takes no branch on the values of a tensor"
"""What would work, for a model that cannot be traced."""


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """Return all inputs with a batch of at least two, since a batch of one would be taken for a fixed size.

    Raises:
        ExportError: If there is none, one is no tensor with a batch axis, or the batches differ.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(value, Tensor) and value.ndim for value in inputs):
        raise ExportError(f"an example is a tensor (batch, ...) or a tuple of such, got {_kinds(inputs)}")
    sizes = {len(value) for value in inputs}
    if len(sizes) != 1 or sizes == {0}:
        raise ExportError(f"the inputs of an example have one batch size of 1 or more, got {sorted(sizes)}")
    return tuple(torch.cat([value, value]) if len(value) == 1 else value for value in inputs)


def batches(inputs: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, ...]]:
    """Return inputs of other batch sizes, to see that the size is free."""
    return {
        "the example": inputs,
        "one sample": tuple(value[:1] for value in inputs),
        "a larger batch": tuple(torch.cat([value, value[:1]]) for value in inputs),
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, and each of its modules back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what torch tells of its own insides while it traces."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, kept in zip(loggers, before, strict=True):
            logger.setLevel(kept)


def batch_axes(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """Return torch.export's description of inputs whose first axis is free."""
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def outputs_of(model: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the tensors that a model gives, in the order in which exporters list them."""
    with torch.no_grad():
        leaves = _pytree.tree_leaves(model(*inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def on_cpu(model: nn.Module) -> None:
    """Refuse a model whose weights lie elsewhere.

    Raises:
        ExportError: Naming a weight and its device.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ExportError(f"a model is exported from the CPU, but {name} is on {tensor.device}; use model.cpu()")


def first_line(error: Exception) -> str:
    """Return what an error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".;:") if lines else type(error).__name__


def _kinds(inputs: tuple[Any, ...]) -> str:
    return ", ".join(type(value).__name__ for value in inputs) or "nothing"
