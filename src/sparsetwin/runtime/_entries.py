"""Programs for one shape, and what is kept of them: the graph without packed weights, the choices, the plan."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.kernels import host_dot
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._choices import (
    Choice,
    Choices,
    Prefer,
    all_dense,
    all_planes,
    make_program,
    measured_choices,
    without_dense_planes,
)
from sparsetwin.runtime._graph import Convolution, Graph, Layer, Linear, Node, Torch, without_weight
from sparsetwin.runtime._lowering import can_use_planes
from sparsetwin.runtime._plan import LayerPlan, Plan
from sparsetwin.runtime._products import Packed, density_of, is_narrow, matrix_key
from sparsetwin.runtime._program import Program
from sparsetwin.runtime._reduced import DensePlanes
from sparsetwin.runtime._rivals import Runner

PROGRAMS = ("sparse", "sparse and dense bfloat16", "sparse, all on planes", "dense graph")
HALF, HALF_MIXED = "sparse float16", "sparse float16 and dense bfloat16"
_ONE_THREAD = ", one thread"


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A program and what it was made from. Weights that kernels hold packed are not in the graph a second time."""

    program: Program
    graph: Graph
    choices: Choices
    packed: Packed
    float32: Choices | None = None  # if planes are float16: what was measured where they are not

    def run(self, call: Call) -> Any:
        """Return the program's result for a call."""
        spec = self.graph.out_spec
        leaves = self.program.run(call.leaves)
        return leaves[0] if spec is None or spec.is_leaf() else pytree.tree_unflatten(leaves, spec)


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """What runs calls of one shape; ``program`` is the fastest one, even if something else runs."""

    call: Call  # whose tensors are gone
    run: Runner
    plan: Plan
    program: Made | None = None


def make_programs(
    graph: Graph,
    choices: Choices,
    *,
    threads: int,
    dense: bool = True,
    prefer: Prefer = "time",
    bfloat16: DensePlanes | None = None,
) -> dict[str, Made]:
    """Return the programs worth timing: as chosen, all on planes, all dense; equal ones once.

    With several threads, those with kernels are there a second time, for one thread: small layers may be faster so.

    Args:
        graph: Fused.
        choices: Of another shape, to take over; measured if they are for other nodes.
        threads: Of the kernels.
        dense: Whether all weights may be there dense at once; else that program is left out, unless it is the choice.
        prefer: As `measured_choices` takes it.
        bfloat16: As `measured_choices` takes it.
    """
    packed = Packed()
    if all(node.output in choices for node in graph.nodes):
        mixed: Choices = {node.output: fitting(graph, node, choices[node.output]) for node in graph.nodes}
        float32 = without_dense_planes(mixed)
    else:
        float32, mixed = measured_choices(graph, packed=packed, threads=threads, prefer=prefer, bfloat16=bfloat16)
    wanted = dict(zip(PROGRAMS, (float32, mixed, all_planes(graph, mixed), all_dense(mixed)), strict=True))
    if not dense:
        del wanted["dense graph"]
    made: dict[str, Made] = {}
    seen: set[tuple[str, ...]] = set()
    for name, found in wanted.items():
        engines = tuple(found[node.output].engine for node in graph.nodes)
        if engines not in seen:
            seen.add(engines)
            name = "dense graph" if set(engines) <= {"dense"} else name
            made[name] = make(graph, found, packed=packed, threads=threads)
    return made | on_one_thread(made) if threads > 1 else made


@torch.no_grad()
def near_float32(programs: Mapping[str, Made], call: Call, bfloat16: DensePlanes | None) -> dict[str, Made]:
    """Return programs without those whose dense bfloat16 layers lead far from float32 on a call; notes tell which."""

    def dense(made: Made) -> bool:
        return any(choice.engine == "dense planes" for choice in made.choices.values())

    exact = next((made for made in programs.values() if not dense(made)), None)
    if bfloat16 is None or exact is None or not any(map(dense, programs.values())):
        return dict(programs)
    expected = copied(exact.program.run(call.leaves))
    return {
        name: made
        for name, made in programs.items()
        if not dense(made) or bfloat16.is_near(name, made.program.run(call.leaves), expected)
    }


def copied(results: Sequence[Any]) -> list[Any]:
    """Return a program's results for keeping: they may lie in its memory."""
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in results]


def on_one_thread(programs: Mapping[str, Made]) -> dict[str, Made]:
    """Return programs with kernels for one thread, by names that say so."""

    def alone(made: Made) -> Made:
        return replace(made, program=make_program(made.graph, made.choices, packed=made.packed, threads=1))

    return {f"{name}{_ONE_THREAD}": alone(found) for name, found in programs.items() if name != "dense graph"}


def is_program(name: str) -> bool:
    """Tell whether a candidate of a plan is a program, which a file can hold."""
    return name.removesuffix(_ONE_THREAD) in (*PROGRAMS, HALF, HALF_MIXED)


def threads_of(plan: Plan) -> int:
    """Return how many threads the kernels of a plan's program take."""
    return 1 if plan.engine.endswith(_ONE_THREAD) else plan.threads


def fitting(graph: Graph, node: Node, choice: Choice) -> Choice:
    """Return a choice of another shape, dense where its engine cannot run this node."""
    fits = {
        "planes": not isinstance(node.operation, Torch) and can_use_planes(graph, node),
        "dense planes": _runs_dense_planes(graph, node, choice),
        "rows": isinstance(node.operation, Linear),
        "dense": True,
    }
    return choice if fits[choice.engine] else replace(choice, engine="dense")


def _runs_dense_planes(graph: Graph, node: Node, choice: Choice) -> bool:
    return isinstance(node.operation, Layer) and can_use_planes(graph, node) and dots_are_here({node.output: choice})


def dots_are_here(choices: Choices) -> bool:
    """Tell whether this process has the instruction that each dense kernel on planes was chosen with."""
    wanted = {choice.dot for choice in choices.values() if choice.engine == "dense planes"}
    if not wanted:
        return True
    found = host_dot()
    return found is not None and wanted == {found.name}


def make(graph: Graph, choices: Choices, *, packed: Packed, threads: int) -> Made:
    """Return a program for a graph whose weights are all there, or in ``packed``."""
    dense = {output for output, choice in choices.items() if choice.engine == "dense planes"}
    tiles = {output: tiles for output, tiles in packed.tiles.items() if output in dense}
    mine = Packed(tiles=tiles, half=packed.half)
    missing = False
    for node in graph.layers():
        key, on_planes = matrix_key(node, choices[node.output].tiling), choices[node.output].engine == "planes"
        if on_planes and key in packed.matrices:
            mine.matrices[key] = packed.matrices[key]
        elif on_planes and not _is_bare(node):
            missing = True
    if missing:
        make_program(graph, choices, packed=mine, threads=threads)  # packs what is not packed yet
    slim = _without_packed(graph, choices)
    program = make_program(slim, choices, packed=mine, threads=threads)
    packed.tiles.update(mine.tiles)  # for other programs of the same layers
    return Made(program=program, graph=slim, choices=choices, packed=mine)


def _is_bare(node: Node) -> bool:
    assert isinstance(node.operation, Layer)
    return node.operation.weight.is_meta


def _without_packed(graph: Graph, choices: Choices) -> Graph:
    """Return the graph with weights without numbers, on the meta device, where kernels hold them packed."""

    def slim(node: Node) -> Node:
        operation = node.operation
        if not isinstance(operation, Layer) or choices[node.output].engine != "planes":
            return node
        return replace(node, operation=without_weight(operation, operation.kept))

    return replace(graph, nodes=tuple(slim(node) for node in graph.nodes))


def unpacked(graph: Graph, packed: Packed) -> Graph:
    """Return a graph with the numbers of all its weights: those that were packed as they are kept, not dense."""
    matrices = {key[0]: matrix for key, matrix in packed.matrices.items()}

    def whole(node: Node) -> Node:
        operation = node.operation
        if not isinstance(operation, Layer) or not operation.weight.is_meta or operation.kept is not None:
            return node
        kept = matrices[node.output].to_kept(tuple(operation.weight.shape))
        return replace(node, operation=replace(operation, kept=kept))

    return replace(graph, nodes=tuple(whole(node) for node in graph.nodes))


def with_program(entry: Entry, graph: Graph, programs: Mapping[str, Made], seconds: Mapping[str, float]) -> Entry:
    """Return an entry that knows the fastest of its programs, its plan with a line for each layer."""
    fastest = min(programs, key=seconds.__getitem__)
    plan = replace(
        entry.plan,
        layers=layer_plans(graph, programs[fastest].choices, half=programs[fastest].packed.half is not None),
        torch_operations=torch_operations(graph),
        workspace_bytes=programs[fastest].program.workspace_bytes(),
    )
    return replace(entry, plan=plan, program=programs[fastest])


def layer_plans(graph: Graph, choices: Choices, *, half: bool = False) -> tuple[LayerPlan, ...]:
    """Return what was chosen and measured for each layer; ``half`` tells that planes are float16."""
    return tuple(
        LayerPlan(
            name=node.name,
            kind=_kind(node),
            density=density_of(node),
            engine=_engine(node, choices[node.output], half=half),
            seconds=dict(choices[node.output].seconds),
        )
        for node in graph.layers()
    )


def _engine(node: Node, choice: Choice, *, half: bool) -> str:
    if half and choice.engine == "planes":
        return "planes, float16"
    narrow = (choice.engine == "planes" and choice.tiling.narrow) or (choice.engine == "rows" and choice.rows.narrow)
    if choice.engine == "dense planes":
        return f"dense planes, {choice.dot}"
    return f"{choice.engine}, narrow values" if narrow and is_narrow(node) else choice.engine


def _kind(node: Node) -> str:
    operation = node.operation
    assert isinstance(operation, Layer)
    weight = operation.weight
    text = f"linear {weight.shape[1]}->{weight.shape[0]}"
    if isinstance(operation, Convolution):
        size = "x".join(map(str, weight.shape[2:]))
        text = f"conv {size} {weight.shape[1] * operation.groups}->{weight.shape[0]}"
        text += f" /{operation.stride[0]}" if operation.stride != (1, 1) else ""
        text += f" groups {operation.groups}" if operation.groups > 1 else ""
    text += " +residual" if operation.residual else ""
    return text if operation.activation is None else f"{text} {operation.activation}"


def torch_operations(graph: Graph) -> dict[str, int]:
    """Return how often PyTorch runs which operation."""
    names = [str(node.operation.function) for node in graph.nodes if isinstance(node.operation, Torch)]
    return dict(Counter(names).most_common())
