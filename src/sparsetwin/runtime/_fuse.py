"""What a graph need not compute by itself: batch norms in weights, activations and residuals at the store."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsetwin.runtime._graph import (
    Activate,
    Add,
    Affine,
    Convolution,
    Graph,
    Layer,
    Linear,
    Node,
    Operation,
    tensors_of,
)


@torch.no_grad()
def fuse(graph: Graph) -> Graph:
    """Return a graph that computes the same with fewer nodes; weights are folded in float64 and rounded to float32."""
    graph = _without_unused(graph)
    for step in (_fold_affine, _fuse_add, _fuse_activation):
        graph = _merged(graph, step)
    nodes = tuple(replace(node, operation=_rounded(node.operation)) for node in graph.nodes)
    return replace(graph, nodes=nodes)


class _Rewriter:
    """Nodes in order, with who reads and who makes a value kept up to date while pairs of nodes become one."""

    def __init__(self, graph: Graph) -> None:
        self.values = graph.values
        self.results = graph.results()
        self.nodes: dict[int, Node] = {}  # by output, in order
        self.readers = {value: len(users) for value, users in graph.users().items()}

    def only_reader(self, value: int) -> bool:
        """Tell whether one node alone reads a value, which is not returned either."""
        return self.readers[value] == 1 and value not in self.results

    def merge(self, first: Node, node: Node, operation: Operation, inputs: tuple[int, ...]) -> None:
        """Put one node, in the place and with the output of ``node``, for the two."""
        del self.nodes[first.output]
        self.nodes[node.output] = Node(name=first.name, operation=operation, inputs=inputs, output=node.output)


def _merged(graph: Graph, step: Callable[[_Rewriter, Node], bool]) -> Graph:
    rewriter = _Rewriter(graph)
    for node in graph.nodes:
        if not step(rewriter, node):
            rewriter.nodes[node.output] = node
    return replace(graph, nodes=tuple(rewriter.nodes.values()))


def _fold_affine(rewriter: _Rewriter, node: Node) -> bool:
    """Fold a batch norm into the convolution before it."""
    if not isinstance(node.operation, Affine) or node.operation.activation is not None:
        return False
    before = rewriter.nodes.get(node.inputs[0])
    if before is None or not isinstance(before.operation, Convolution) or not rewriter.only_reader(before.output):
        return False
    convolution, scale = before.operation, node.operation.scale
    if convolution.activation is not None or convolution.residual:
        return False
    shift = node.operation.shift
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    if convolution.kept is None:
        folded = replace(convolution, weight=_scaled(convolution.weight, scale), bias=shift)
    else:
        folded = replace(convolution, kept=convolution.kept.scaled(scale), bias=shift)
    rewriter.merge(before, node, folded, before.inputs)
    return True


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    return (
        weight.double() * scale.double().reshape(-1, 1, 1, 1)
    ).float()  # at once: a network in float64 would take twice its memory


def _fuse_add(rewriter: _Rewriter, node: Node) -> bool:
    """Let a layer add the other operand at its store; the later of two layers, since it has what it needs."""
    if not isinstance(node.operation, Add) or node.inputs[0] == node.inputs[1]:
        return False
    order = list(rewriter.nodes)
    places = {value: order.index(value) for value in node.inputs if value in rewriter.nodes}
    for value in sorted(places, key=places.__getitem__, reverse=True):
        before = rewriter.nodes[value]
        layer = before.operation
        if not isinstance(layer, Layer) or layer.residual or layer.activation is not None:
            continue
        if not rewriter.only_reader(value):
            continue
        other = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
        rewriter.merge(before, node, replace(layer, residual=True), (*before.inputs, other))
        return True
    return False


def _fuse_activation(rewriter: _Rewriter, node: Node) -> bool:
    """Let the node before apply an activation at its store."""
    if not isinstance(node.operation, Activate):
        return False
    before = rewriter.nodes.get(node.inputs[0])
    if before is None or not isinstance(before.operation, Convolution | Linear | Affine | Add):
        return False
    if before.operation.activation is not None or not rewriter.only_reader(before.output):
        return False
    rewriter.merge(before, node, replace(before.operation, activation=node.operation.activation), before.inputs)
    return True


def _without_unused(graph: Graph) -> Graph:
    """Drop nodes whose results nobody reads."""
    needed, kept = graph.results(), []
    for node in reversed(graph.nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    return replace(graph, nodes=tuple(reversed(kept)))


def _rounded(operation: Operation) -> Operation:
    """Return an operation with contiguous float32 weights; tensors of other operations stay as they are."""
    if not isinstance(operation, Convolution | Linear | Affine):
        return operation
    if all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors_of(operation)):
        return operation
    if isinstance(operation, Affine):
        return replace(operation, scale=_float32(operation.scale), shift=_float32(operation.shift))
    bias = None if operation.bias is None else _float32(operation.bias)
    return replace(operation, weight=_float32(operation.weight), bias=bias)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
