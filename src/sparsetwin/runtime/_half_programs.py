"""The float16 program of a graph: as chosen where planes are float16, and near enough to float32 to take part."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsetwin.errors import SparsetwinError
from sparsetwin.runtime._choices import Choices, half_choices, without_dense_planes
from sparsetwin.runtime._entries import HALF, HALF_MIXED, Made, copied, fitting, make, on_one_thread
from sparsetwin.runtime._graph import Graph
from sparsetwin.runtime._half import Half
from sparsetwin.runtime._products import Packed
from sparsetwin.runtime._reduced import LARGEST_ERROR_OF_ALL, DensePlanes, largest_error

MOST_ERROR = {HALF: 5e-3, HALF_MIXED: LARGEST_ERROR_OF_ALL}  # max|y - ref| / max|ref| of a whole network


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfPrograms:
    """Float16 programs that may take part, or why there is none."""

    made: Mapping[str, Made] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@torch.no_grad()
def half_programs(
    graph: Graph,
    float32: Made,
    half: Half,
    *,
    threads: int,
    examples: Sequence[Sequence[Any]],
    choices: Choices | None = None,
    bfloat16: DensePlanes | None = None,
) -> HalfPrograms:
    """Return the float16 programs of a graph, after a comparison with float32; one thread more as for others.

    Args:
        graph: Fused.
        float32: The program to compare with; its choices say what is known of engines on tensors.
        half: How to compute.
        threads: Of the kernels.
        examples: Leaves of calls to compare the programs on.
        choices: Of another shape, to take over; measured if None.
        bfloat16: Permission for dense kernels on the same planes; the program with them is another one.
    """
    packed = Packed(half=half)
    if choices is None:
        alone, mixed = half_choices(graph, float32.choices, packed=packed, threads=threads, bfloat16=bfloat16)
    else:
        mixed = {node.output: fitting(graph, node, choices[node.output]) for node in graph.nodes}
        alone = without_dense_planes(mixed)
    expected = [copied(float32.program.run(leaves)) for leaves in examples]
    programs: dict[str, Made] = {}
    skipped: dict[str, str] = {}
    notes: list[str] = []
    for name, chosen in {HALF: alone, HALF_MIXED: mixed}.items():
        if name == HALF_MIXED and all(choice.engine != "dense planes" for choice in mixed.values()):
            continue
        if all(choice.form != "planes" for choice in chosen.values()):
            skipped[name] = "no layer is faster on planes of float16"
            continue
        made = replace(make(graph, chosen, packed=packed, threads=threads), float32=float32.choices)
        try:
            error = max(_error(made.program.run(leaves), ref) for leaves, ref in zip(examples, expected, strict=True))
        except SparsetwinError as reason:
            skipped[name] = str(reason)
            continue
        found = f"relative error {error:.2g} against float32 on {len(examples)} calls"
        if error <= MOST_ERROR[name]:
            programs[name] = made
            notes.append(f"{name}: {found}")
        else:
            skipped[name] = f"too far from float32: {found}"
    if threads > 1:
        programs |= on_one_thread(programs)
    return HalfPrograms(made=programs, skipped=skipped, notes=tuple(notes))


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest relative error of a call's results; infinite where one is not finite."""
    tensors = [y for y in (*found, *expected) if isinstance(y, Tensor) and y.is_floating_point()]
    return largest_error(found, expected) if all(bool(y.isfinite().all()) for y in tensors) else math.inf
