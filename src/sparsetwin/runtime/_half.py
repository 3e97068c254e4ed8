"""Float16 planes: what their numbers are multiplied with so that they fit, and what that does to weights and biases.

A value ``v`` with exponent ``e`` lies in planes as ``v * 2**-e``, which changes no digit of it. Layers take that into
their weights and biases; what a kernel adds or compares as it lies has one exponent, and what goes through GELU or SiLU
has none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsetwin.kernels import Target, half_target, is_available
from sparsetwin.runtime._graph import Graph, MaxPool, Node, Torch
from sparsetwin.runtime._plain import each_value

_LARGEST = 5  # values are scaled to be less than 2 to this power: 2**11 times less than what overflows
_CURVED = ("gelu", "gelu_tanh", "silu")


@dataclass(frozen=True, kw_only=True, eq=False)
class Half:
    """How a program computes in float16: on what, and each value's exponent; that of others is zero."""

    target: Target
    exponents: Mapping[int, int] = field(default_factory=dict)

    def weight_factor(self, node: Node) -> float:
        """Return what a node's weight is multiplied with."""
        return 2.0 ** (self.exponents.get(node.inputs[0], 0) - self.exponents.get(node.output, 0))

    def bias_factor(self, node: Node) -> float:
        """Return what a node's bias is multiplied with."""
        return 2.0 ** -self.exponents.get(node.output, 0)

    def factors(self) -> dict[int, float]:
        """Return for each value with an exponent what its numbers are multiplied with."""
        return {value: 2.0**-exponent for value, exponent in self.exponents.items() if exponent}


def half_target_if(*, allowed: bool) -> Target | None:
    """Return this machine's target with float16 arithmetic, if that is allowed and there is one."""
    return half_target() if allowed and is_available() else None


@torch.no_grad()
def largest_values(graph: Graph, calls: Iterable[Sequence[Any]]) -> dict[int, float]:
    """Return the largest magnitude that each float value has in some calls, given by their leaves."""
    found: dict[int, float] = {}
    for leaves in calls:
        for value, tensor in each_value(graph, leaves):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                found[value] = max(found.get(value, 0.0), float(tensor.abs().max()))
    return found


def exponents_for(graph: Graph, largest: Mapping[int, float]) -> dict[int, int]:
    """Return the exponent of each value, so that magnitudes like these lie between 16 and 32.

    Args:
        graph: Fused.
        largest: As `largest_values` returned it; values that are not there, zero or not finite get no exponent.
    """
    parent = {value: value for value in graph.values}

    def root(value: int) -> int:
        while parent[value] != value:
            value = parent[value]
        return value

    curved: set[int] = set()
    for node in graph.nodes:
        if isinstance(node.operation, Torch):
            continue
        for value in node.inputs if isinstance(node.operation, MaxPool) else node.inputs[1:]:
            parent[root(value)] = root(node.output)
        if getattr(node.operation, "activation", None) in _CURVED:
            curved.add(node.output)
    pinned = {root(value) for value in curved}
    classes: dict[int, float] = {}
    for value, magnitude in largest.items():
        classes[root(value)] = max(classes.get(root(value), 0.0), magnitude)
    exponents = {found: _exponent(magnitude) for found, magnitude in classes.items() if found not in pinned}
    return {value: exponents[root(value)] for value in graph.values if exponents.get(root(value), 0)}


def _exponent(magnitude: float) -> int:
    """Return the exponent that brings a magnitude between 16 and 32.

    >>> _exponent(31.0), _exponent(1.0), _exponent(3000.0), _exponent(0.0), _exponent(float("inf"))
    (0, -4, 7, 0, 0)
    """
    if not 0.0 < magnitude < math.inf:
        return 0
    return math.frexp(magnitude)[1] - _LARGEST
