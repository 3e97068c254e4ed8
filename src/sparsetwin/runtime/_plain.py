"""Every operation of a graph in plain PyTorch: what kernels must equal, and what runs where they do not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetwin.kernels import Activation
from sparsetwin.runtime._graph import (
    Activate,
    Add,
    Affine,
    Convolution,
    GlobalMean,
    Graph,
    Layer,
    Linear,
    MaxPool,
    Operation,
    Ref,
    Torch,
    filled,
    references,
    with_weight,
)
from sparsetwin.runtime._operations import checked

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


_METHODS: dict[str, Callable[..., Any]] = {  # the same, called faster than by name
    "aten.view.default": Tensor.reshape,  # channels may lie last here where the model's do not
    "aten._unsafe_view.default": Tensor.reshape,
    "aten.reshape.default": Tensor.reshape,
    "aten.transpose.int": Tensor.transpose,
    "aten.permute.default": Tensor.permute,
    "aten.flatten.using_ints": Tensor.flatten,
    "aten.select.int": Tensor.select,
    "aten.unsqueeze.default": Tensor.unsqueeze,
}


def activate(x: Tensor, activation: Activation | None) -> Tensor:
    """Apply an activation, if there is one."""
    return x if activation is None else _ACTIVATIONS[activation](x)


def apply(operation: Operation, inputs: Sequence[Any]) -> Any:
    """Return what a node with this operation makes of its inputs; a `Torch` operation gets its `Ref` in order."""
    x: Any = inputs[0]
    operation = with_weight(operation) if isinstance(operation, Layer) else operation
    match operation:
        case Convolution():
            y = F.conv2d(
                x,
                operation.weight,
                operation.bias,
                operation.stride,
                operation.padding,
                operation.dilation,
                operation.groups,
            )
            return activate(y + inputs[1] if operation.residual else y, operation.activation)
        case Linear():
            y = F.linear(x, operation.weight, operation.bias)
            return activate(y + inputs[1] if operation.residual else y, operation.activation)
        case Affine():
            y = x * operation.scale.reshape(-1, 1, 1) + operation.shift.reshape(-1, 1, 1)
            return activate(y, operation.activation)
        case Add():
            return activate(x + inputs[1], operation.activation)
        case Activate():
            return activate(x, operation.activation)
        case MaxPool():
            return F.max_pool2d(x, operation.kernel, operation.stride, operation.padding)
        case GlobalMean():
            return x.mean(dim=(2, 3), keepdim=operation.keep)
    raise AssertionError(f"{operation} is run by apply_torch")


def apply_torch(operation: Torch, values: Mapping[int, Any]) -> Any:
    """Return the result of an operation that PyTorch runs."""
    function = _function(operation)
    return function(*filled(operation.arguments, values), **filled(operation.named, values))


def _function(operation: Torch) -> Callable[..., Any]:
    return _METHODS.get(str(operation.function)) or checked(operation.function)


def torch_function(operation: Torch) -> Callable[[Mapping[int, Any]], Any]:
    """Return what runs an operation in PyTorch again and again, its arguments prepared."""
    nested = [
        part
        for part in (*operation.arguments, *operation.named.values())
        if not isinstance(part, Ref) and next(references(part), None) is not None
    ]
    if nested:
        return partial(apply_torch, operation)
    function = _function(operation)
    places = [(place, part.value) for place, part in enumerate(operation.arguments) if isinstance(part, Ref)]
    names = [(name, part.value) for name, part in operation.named.items() if isinstance(part, Ref)]
    arguments, named = tuple(operation.arguments), dict(operation.named)

    def run(values: Mapping[int, Any]) -> Any:
        filled_in = list(arguments)
        for place, value in places:
            filled_in[place] = values[value]
        if not names:
            return function(*filled_in, **named)
        return function(*filled_in, **{**named, **{name: values[value] for name, value in names}})

    return run


def run_plain(graph: Graph, leaves: Sequence[Any]) -> list[Any]:
    """Return the leaves of the result for the leaves of a call, computed node by node in PyTorch.

    It is dense, with zeros for pruned weights: the reference of everything else here.
    """
    values = values_of(graph, leaves)
    return [filled(leaf, values) for leaf in graph.outputs]


@torch.no_grad()
def values_of(graph: Graph, leaves: Sequence[Any]) -> dict[int, Any]:
    """Return every value of a graph for the leaves of a call."""
    return dict(each_value(graph, leaves))


def each_value(graph: Graph, leaves: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield every value of a graph and what it is for the leaves of a call; holds on to those that are still read."""
    last = {value: node.output for node in graph.nodes for value in node.inputs}
    values: dict[int, Any] = {
        value: leaf for value, leaf in zip(graph.inputs, leaves, strict=True) if value is not None
    }
    yield from values.items()
    for node in graph.nodes:
        operation = node.operation
        if isinstance(operation, Torch):
            values[node.output] = apply_torch(operation, values)
        else:
            values[node.output] = apply(operation, [values[value] for value in node.inputs])
        yield node.output, values[node.output]
        for value in set(node.inputs):
            if last[value] == node.output:
                del values[value]
