"""Which sizes of a call a network's operations hold: it is traced for other sizes, and the operations are compared.

A trace has fixed sizes, and what a model computes from them (a kernel as large as the image, a scale by the width)
stands in it as a plain number. Only a second trace tells such a number from one of the model's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.errors import UsageError
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._graph import Graph, MaxPool, Torch

Axes = tuple[tuple[int, ...], ...]  # for each leaf of a call the axes whose sizes no operation depends on
Tracer = Callable[[tuple[Any, ...], Mapping[str, Any]], Graph]
_ANY_SIZE = frozenset(  # operations that compute the same for all sizes, if the model gives them the same arguments
    f"aten.{name}"
    for name in (
        "contiguous.default",
        "flatten.using_ints",
        "add.Tensor",
        "sub.Tensor",
        "mul.Tensor",
        "div.Tensor",
        "cat.default",
        "sigmoid.default",
        "tanh.default",
        "relu6.default",
        "hardtanh.default",
        "hardswish.default",
        "hardsigmoid.default",
        "leaky_relu.default",
        "elu.default",
        "softmax.int",
        "avg_pool2d.default",
        "max_pool2d.default",
        "adaptive_avg_pool2d.default",
    )
)
_NO_SIZES = ("dim", "start_dim", "end_dim")  # arguments that number axes


def operations_of_one_size(graph: Graph) -> list[str]:
    """Return the names of operations that are known for no other sizes than those they were traced for."""
    names = {str(node.operation.function) for node in graph.nodes if isinstance(node.operation, Torch)}
    return sorted(names - _ANY_SIZE)


def numbers_of_unknown_origin(graph: Graph) -> list[str]:
    """Return the names of operations with numbers that a model may have computed from sizes."""
    found = set()
    for node in graph.nodes:
        if isinstance(node.operation, MaxPool):
            found.add("max_pool2d")
        elif isinstance(node.operation, Torch) and any(map(_has_number, _own_arguments(node.operation))):
            found.add(str(node.operation.function))
    return sorted(found)


def _own_arguments(operation: Torch) -> Iterator[Any]:
    """Yield the arguments that number no axes and are not the operation's defaults."""
    schema = operation.function._schema.arguments
    for place, part in enumerate(schema):
        given = operation.arguments[place] if place < len(operation.arguments) else operation.named.get(part.name)
        is_default = not isinstance(given, Tensor) and given == part.default_value
        if part.name not in _NO_SIZES and not is_default:
            yield given


def _has_number(argument: Any) -> bool:
    if isinstance(argument, (tuple, list)):
        return any(map(_has_number, argument))
    if isinstance(argument, Tensor):
        return argument.numel() == 1
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def free_axes(call: Call, trace: Tracer) -> Axes | None:
    """Return the axes whose sizes may change without a change of any operation.

    Args:
        call: What was traced; its tensors need no numbers.
        trace: Returns the graph of arguments.

    Returns:
        For each leaf those that were found free; all at once or only the first of each tensor, the batch. None if it
        cannot be known, since the model takes no other sizes that were tried.
    """
    graph = trace(*_zeros(call, [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in call.leaves]))
    known = False
    for axes in (_movable(call.leaves), _first(call.leaves)):
        for larger in (_odd, _eight, _twice):
            same = _is_same(graph, call, axes, larger, trace)
            if same:
                return axes
            if same is not None:
                known = True
                break
    return _no_axes(call) if known else None


def _no_axes(call: Call) -> Axes:
    return tuple(() for _ in call.leaves)


def _movable(leaves: Sequence[Any]) -> Axes:
    """Return the axes that batches, pixels and tokens lie on."""

    def axes(leaf: Any) -> tuple[int, ...]:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return ()
        if leaf.dim() == 2 and not leaf.is_floating_point():
            return (0, 1)
        return (0, 1) if leaf.dim() == 3 else (0, *range(2, leaf.dim()))

    return tuple(axes(leaf) for leaf in leaves)


def _first(leaves: Sequence[Any]) -> Axes:
    return tuple((0,) if isinstance(leaf, Tensor) and leaf.dim() else () for leaf in leaves)


def _odd(size: int, axis: int) -> int:
    return size + 3 + 4 * axis


def _eight(size: int, axis: int) -> int:
    return size + 8


def _twice(size: int, axis: int) -> int:
    return 2 * size


def _is_same(graph: Graph, call: Call, axes: Axes, larger: Callable[[int, int], int], trace: Tracer) -> bool | None:
    """Tell whether a graph for larger sizes has the same operations; None if the model does not take these sizes."""

    def shape(leaf: Any, free: tuple[int, ...]) -> tuple[int, ...] | None:
        if not isinstance(leaf, Tensor):
            return None
        return tuple(larger(size, axis) if axis in free else size for axis, size in enumerate(leaf.shape))

    try:
        other = trace(*_zeros(call, [shape(leaf, free) for leaf, free in zip(call.leaves, axes, strict=True)]))
    except UsageError:
        return None
    return _equal((graph.nodes, graph.outputs, graph.inputs), (other.nodes, other.outputs, other.inputs))


def _zeros(call: Call, shapes: Sequence[tuple[int, ...] | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves, spec = pytree.tree_flatten((call.arguments, dict(call.named)))
    found = [
        torch.zeros(shape, dtype=leaf.dtype, device="cpu") if shape is not None else leaf
        for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    arguments, named = pytree.tree_unflatten(found, spec)
    return tuple(arguments), named


def _equal(one: Any, other: Any) -> bool:
    """Tell whether parts of two graphs are the same, constants and weights included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.is_meta != other.is_meta:
            return False
        return one.is_meta or torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if is_dataclass(one):
        return all(_equal(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    return bool(one == other)


def changed_axes(call: Call, planned: Call) -> Axes:
    """Return for each leaf of a call the axes whose sizes are not those that were planned; of as many axes each."""

    def axes(leaf: Any, before: Any) -> tuple[int, ...]:
        if not isinstance(leaf, Tensor):
            return ()
        return tuple(axis for axis, size in enumerate(leaf.shape) if size != before.shape[axis])

    return tuple(axes(leaf, before) for leaf, before in zip(call.leaves, planned.leaves, strict=True))
