"""A network as data: nodes that read values and make one, the operations that kernels know, and all others.

Every value is a tensor of a known shape (or what PyTorch returns in its place, such as a tuple). Operations are pure.
Activations of a `Convolution` or a `Linear` are applied after the residual is added.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.kernels import Activation, KeptWeight

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Convolution:
    """``activation(conv2d(x, weight) + bias + residual)``; inputs x, and the residual if there is one.

    A weight on the meta device has no numbers: they are in ``kept``, or packed in a kernel.
    """

    weight: Tensor = field(repr=False)  # (out, in / groups, kh, kw)
    bias: Tensor | None = field(repr=False)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    activation: Activation | None = None
    residual: bool = False
    kept: KeptWeight | None = field(repr=False, default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """``activation(x weight^T + bias + residual)`` on the last axis; inputs as for `Convolution`."""

    weight: Tensor = field(repr=False)  # (out, in)
    bias: Tensor | None = field(repr=False)
    activation: Activation | None = None
    residual: bool = False
    kept: KeptWeight | None = field(repr=False, default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    """``activation(scale * x + shift)`` a channel: a batch norm that follows no convolution."""

    scale: Tensor = field(repr=False)  # (channels,)
    shift: Tensor = field(repr=False)
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Add:
    """``activation(a + b)`` of two tensors of one shape."""

    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Activate:
    """An activation function by itself."""

    activation: Activation


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """``max_pool2d``; padding never wins."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)


@dataclass(frozen=True, kw_only=True)
class GlobalMean:
    """The mean of each channel's pixels; ``keep`` leaves two axes of length one."""

    keep: bool


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A value's place among the arguments of a `Torch` operation."""

    value: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Torch:
    """Any other operation, run by PyTorch: a function, and arguments that hold `Ref`, tensors and plain data."""

    function: Any
    arguments: tuple[Any, ...] = field(repr=False)
    named: Mapping[str, Any] = field(repr=False, default_factory=dict)


Layer = Convolution | Linear
Operation = Convolution | Linear | Affine | Add | Activate | MaxPool | GlobalMean | Torch


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One operation: values it reads, the value it makes, and the name of the layer that it comes from."""

    name: str
    operation: Operation
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """A network for inputs of fixed shapes, its nodes in an order in which they can run."""

    nodes: tuple[Node, ...]
    values: Mapping[int, Value | None]  # None: no tensor, such as a tuple of them
    inputs: tuple[int | None, ...]  # a value for each leaf of the call; None for one that is no tensor
    outputs: tuple[Any, ...]  # a `Ref`, or a constant, for each leaf of the result
    out_spec: pytree.TreeSpec | None  # how leaves make up the result; None: it is the only leaf

    def users(self) -> dict[int, list[Node]]:
        """Return the nodes that read each value."""
        found: dict[int, list[Node]] = {value: [] for value in self.values}
        for node in self.nodes:
            for value in set(node.inputs):
                found[value].append(node)
        return found

    def results(self) -> set[int]:
        """Return the values that the network returns."""
        return {leaf.value for leaf in self.outputs if isinstance(leaf, Ref)}

    def producers(self) -> dict[int, Node]:
        """Return the node that makes each value that is no input."""
        return {node.output: node for node in self.nodes}

    def layers(self) -> list[Node]:
        """Return the nodes with weights of convolutions and linear layers."""
        return [node for node in self.nodes if isinstance(node.operation, Layer)]


def with_weight(operation: Layer) -> Layer:
    """Return a layer whose weight is there, dense; made anew if the layer has kept weights only."""
    if operation.kept is None:
        return operation
    weight = operation.kept.dense().reshape(operation.weight.shape)
    return replace(operation, weight=weight, kept=None)


def without_weight(operation: Layer, kept: KeptWeight | None) -> Layer:
    """Return a layer whose weight has a shape only; its numbers are kept, or elsewhere."""
    weight = torch.empty(operation.weight.shape, dtype=torch.float32, device="meta")
    return replace(operation, weight=weight, kept=kept)


def references(arguments: Any) -> Iterator[int]:
    """Yield the values that arguments refer to, from left to right, repetitions included."""
    if isinstance(arguments, Ref):
        yield arguments.value
    elif isinstance(arguments, (tuple, list)):
        for part in arguments:
            yield from references(part)
    elif isinstance(arguments, Mapping):
        for part in arguments.values():
            yield from references(part)


def filled(arguments: Any, values: Mapping[int, Any]) -> Any:
    """Return arguments with each `Ref` replaced by its value."""
    if isinstance(arguments, Ref):
        return values[arguments.value]
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(filled(part, values) for part in arguments)
    if isinstance(arguments, Mapping):
        return {name: filled(part, values) for name, part in arguments.items()}
    return arguments


def tensors_of(operation: Operation) -> Iterator[Tensor]:
    """Yield the weights and constants of an operation."""
    assert is_dataclass(operation)
    stack = [getattr(operation, part.name) for part in fields(operation)]
    while stack:
        found = stack.pop()
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, (tuple, list)):
            stack.extend(found)
        elif isinstance(found, Mapping):
            stack.extend(found.values())
