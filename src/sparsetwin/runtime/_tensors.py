"""Which tensors between kernels and PyTorch share memory: those that no result can be a view of.

Memory that is asked for anew in each call costs more than what is written into it.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsetwin.runtime._graph import Convolution, Graph, Node, Ref, Torch, tensors_of
from sparsetwin.runtime._memory import Part, Segment
from sparsetwin.runtime._native import hides_view
from sparsetwin.runtime._steps import TensorStep, Unpack, values_read, values_written


@dataclass(frozen=True, kw_only=True)
class TensorBuffer:
    """Memory of one tensor, float32, whatever PyTorch's default dtype and device are."""

    shape: tuple[int, ...]
    blocked: bool  # channels lie last, as dense convolutions want it

    def empty(self) -> torch.Tensor:
        """Return the memory, not initialised."""
        kind = torch.channels_last if self.blocked else torch.contiguous_format
        return torch.empty(self.shape, dtype=torch.float32, device="cpu", memory_format=kind)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors:
    """Where the tensors that kernels write lie: buffers of the workspace, or new ones in each call."""

    buffers: tuple[TensorBuffer, ...]
    kept: Mapping[int, int]  # value -> buffer
    fresh: Mapping[int, TensorBuffer]  # value -> what is made in each call


def plan_tensors(parts: Sequence[Part], graph: Graph) -> Tensors:
    """Return a buffer for each tensor that kernels write; one serves several that are not needed at once."""
    last = _last_parts(parts, graph)
    blocked = {
        value
        for part in parts
        if isinstance(part, TensorStep) and isinstance(part.node.operation, Convolution)
        for value in part.node.inputs
    }
    buffers: list[TensorBuffer] = []
    kept: dict[int, int] = {}
    fresh: dict[int, TensorBuffer] = {}
    busy: dict[int, int] = {}  # buffer -> the part after which it is free
    for number, part in enumerate(parts):
        if not isinstance(part, Segment):
            continue
        for step in part.steps:
            for value in values_written(step):
                found = graph.values[value]
                assert found is not None
                lies_blocked = isinstance(step, Unpack) and value in blocked and len(found.shape) == 4
                buffer = TensorBuffer(shape=found.shape, blocked=lies_blocked)
                if value not in last:
                    fresh[value] = buffer
                    continue
                free = [place for place, wanted in enumerate(buffers) if wanted == buffer and busy[place] < number]
                if not free:
                    free = [len(buffers)]
                    buffers.append(buffer)
                kept[value] = free[-1]
                busy[free[-1]] = last[value]
    return Tensors(buffers=tuple(buffers), kept=kept, fresh=fresh)


def _last_parts(parts: Sequence[Part], graph: Graph) -> dict[int, int]:
    """Return the last part that may read each value or a view of it, but for those that results may be views of."""
    views: dict[int, set[int]] = {value: {value} for value in graph.values}
    for node in reversed(graph.nodes):
        if may_be_view(node):
            for value in node.inputs:
                views[value] |= views[node.output]
    used: dict[int, int] = {}
    for number, part in enumerate(parts):
        for step in part.steps if isinstance(part, Segment) else (part,):
            for value in (*values_read(step), *values_written(step)):
                used[value] = number
    results = graph.results()
    return {value: max(used.get(view, -1) for view in found) for value, found in views.items() if not found & results}


def lasting_results(graph: Graph) -> frozenset[int]:
    """Return the places of results that are constants of the graph, or may be views of them: callers get copies."""
    lasting: set[int] = set()
    for node in graph.nodes:
        if may_be_view(node) and (
            next(tensors_of(node.operation), None) is not None or lasting.intersection(node.inputs)
        ):
            lasting.add(node.output)
    return frozenset(
        place
        for place, leaf in enumerate(graph.outputs)
        if isinstance(leaf, torch.Tensor) or (isinstance(leaf, Ref) and leaf.value in lasting)
    )


def may_be_view(node: Node) -> bool:
    """Tell whether a node's result may share memory with what it reads."""
    if not isinstance(node.operation, Torch):
        return False
    function: Any = node.operation.function
    if function is operator.getitem or not isinstance(function, torch._ops.OpOverload):
        return True
    return hides_view(function) or any(result.alias_info is not None for result in function._schema.returns)
