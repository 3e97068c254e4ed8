"""Small steps of PyTorch on one thread: its other threads spin for milliseconds after each step that they share.

That would keep the threads of the kernels, which come next, from their processors.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsetwin.runtime._graph import Layer, Node, Value

_PRODUCTS = 1 << 23  # multiply-adds of a layer that are worth PyTorch's threads
_ELEMENTS = 1 << 17  # of another operation's result


def serial(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same with one of PyTorch's threads; the caller's number of them stays."""

    def alone(*arguments: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1:
            return run(*arguments)
        try:
            torch.set_num_threads(1)
            return run(*arguments)
        finally:
            torch.set_num_threads(threads)

    return alone


def is_small(node: Node, values: Mapping[int, Value | None]) -> bool:
    """Tell whether a node on tensors has too little work to share it."""
    value = values[node.output]
    if value is None:
        return False
    elements = torch.Size(value.shape).numel()
    if not isinstance(node.operation, Layer):
        return elements < _ELEMENTS
    weight = node.operation.weight
    return elements * (weight.numel() // weight.shape[0]) < _PRODUCTS
