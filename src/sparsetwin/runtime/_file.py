"""Deployed networks in a file: safetensors with one JSON text in its metadata; mapped into memory when read.

Tensors are named by the hash of their content, the text carries a hash of itself, and both are compared when read. A
file holds the plans so far, and kept weights only where sparse kernels run.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.checkpoint import replace_by_name
from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.kernels import Tiling
from sparsetwin.runtime._calls import Call, call_key
from sparsetwin.runtime._choices import Choice, Choices, Engine
from sparsetwin.runtime._coding import (
    Store,
    decoded_graph,
    decoded_matrix,
    decoded_spec,
    encoded_graph,
    encoded_matrix,
    encoded_spec,
)
from sparsetwin.runtime._entries import Entry, Made, is_program
from sparsetwin.runtime._graph import Graph, Layer, Node
from sparsetwin.runtime._plan import Plan
from sparsetwin.runtime._products import Packed
from sparsetwin.runtime._sizes import Axes

_KEY, _VERSION = "sparsetwin", 2
_LINE = 64  # bytes
_EXPONENTS = 200  # beyond any float32 number's
_KINDS = {kind.name: kind for kind in inspect._ParameterKind}


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedHalf:
    """How a saved program computes in float16; its weights are saved as for float32."""

    target: str
    exponents: Mapping[int, int]
    float32: Choices  # of the same layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Saved:
    """One shape's plan as a file holds it."""

    call: Call
    graph: Graph
    choices: Choices
    packed: Packed
    plan: Plan
    half: SavedHalf | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedFile:
    """A deployed network as a file holds it."""

    name: str  # the model's class
    signature: inspect.Signature
    shapes: list[Saved]
    axes: Axes | None  # of the first shape's call, whose sizes may change; None: not known


def save_entries(
    path: Path, entries: Sequence[Entry], *, name: str, signature: inspect.Signature, axes: Axes | None = None
) -> None:
    """Write entries to a file, replacing it when the new one is complete.

    Args:
        path: Of the file.
        entries: The example's first.
        name: The model's class.
        signature: How it is called.
        axes: For each leaf of the first entry's call those whose sizes may change; None if that is not known.

    Raises:
        UsageError: If there is no program, or something that a file cannot name.
        CheckpointError: If the file cannot be written; an old one is as it was.
    """
    store = Store()
    shapes = [_encoded_entry(entry, store) for entry in entries if entry.program is not None]
    if entries[0].program is None:
        raise UsageError(f"this {name} was not traced, so there is no plan to save: save the model itself")
    content = {
        "version": _VERSION,
        "name": name,
        "signature": _encoded_signature(signature),
        "shapes": shapes,
        "free_axes": axes,  # not in files of the first releases of this version
        "tensors": {key: list(tensor.shape) for key, tensor in sorted(store.tensors.items())},
    }
    _write_aligned(path, {key: _in_lines(tensor) for key, tensor in store.tensors.items()}, json.dumps(content))


def _write_aligned(path: Path, tensors: dict[str, Tensor], text: str) -> None:
    """Write a file in which every tensor begins at a cache line, as in memory: some sums depend on that."""
    outer = {"sha256": _digest(text), "content": text, "padding": ""}

    def write(temporary: Path) -> None:
        for _ in range(2):
            try:
                save_file(tensors, temporary, metadata={_KEY: json.dumps(outer)})
            except SafetensorError as error:  # in place of an OSError, whose number stands in its text
                number = re.search(r"os error (\d+)", str(error))
                raise (OSError(str(error)) if number is None else OSError(int(number[1]), str(error))) from error
            with temporary.open("rb") as file:
                header = 8 + int.from_bytes(file.read(8), "little")
            if header % _LINE == 0:
                break
            outer["padding"] = " " * (-header % _LINE)

    replace_by_name(path, write)


def _in_lines(tensor: Tensor) -> Tensor:
    """Return a tensor's elements, filled up to whole cache lines."""
    flat = tensor.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % (_LINE // flat.element_size())))


def read_file(path: Path) -> SavedFile:
    """Return what was saved, on the memory of the file.

    Raises:
        CheckpointError: If the file is missing, damaged, foreign or of another version.
    """
    try:
        content, tensors = _checked_content(path)
        if content["version"] != _VERSION:
            raise CheckpointError(f"{path} is of version {content['version']}; this one reads {_VERSION}")
        saved = [_decoded_entry(found, tensors) for found in content["shapes"]]
        signature = _decoded_signature(content["signature"])
        name = str(content["name"])
        axes = _decoded_axes(content.get("free_axes"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or of another version: {error!r}") from error
    if not saved:
        raise CheckpointError(f"{path} holds no plan")
    if axes is not None and len(axes) != len(saved[0].call.leaves):
        raise CheckpointError(f"{path} is damaged: it has free axes for another call than its plan")
    return SavedFile(name=name, signature=signature, shapes=saved, axes=axes)


def _decoded_axes(found: Any) -> Axes | None:
    return None if found is None else tuple(tuple(map(int, axes)) for axes in found)


def _checked_content(path: Path) -> tuple[Any, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            outer = json.loads(metadata.get(_KEY, "null"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = file.get_tensor(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if not isinstance(outer, Mapping) or not isinstance(outer.get("content"), str):
        raise CheckpointError(f"{path} is no deployed network; write one with deployed.save(path)")
    if _digest(outer["content"]) != outer.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its text does not match its hash")
    content = json.loads(outer["content"])
    found = Store()
    for name, shape in content["tensors"].items():
        size = torch.Size(shape).numel()
        if name not in tensors or tensors[name].dim() != 1 or tensors[name].numel() < size:
            raise CheckpointError(f"{path} is damaged: a tensor is missing or too short")
        tensors[name] = tensors[name][:size].view(shape)
        if found.put(tensors[name]) != name:
            raise CheckpointError(f"{path} is damaged: a tensor does not match its hash")
    return content, tensors


def _encoded_entry(entry: Entry, store: Store) -> Any:
    made = entry.program
    assert made is not None
    leaves, spec = pytree.tree_flatten((entry.call.arguments, dict(entry.call.named)))
    return {
        "arguments": {"spec": encoded_spec(spec), "leaves": [_encoded_leaf(leaf) for leaf in leaves]},
        "graph": encoded_graph(_without_packed(made), store),
        "choices": {str(output): _encoded_choice(choice) for output, choice in made.choices.items()},
        "matrices": [
            {"node": node, "block": block, "narrow": narrow, "matrix": encoded_matrix(matrix, store)}
            for (node, block, narrow), matrix in made.packed.matrices.items()
        ],
        "plan": _plan_of_program(entry.plan).to_json(),
        **_encoded_half(made),
    }


def _encoded_half(made: Made) -> dict[str, Any]:
    half = made.packed.half
    if half is None or made.float32 is None:
        return {}
    choices = {str(output): _encoded_choice(choice) for output, choice in made.float32.items()}
    exponents = {str(value): exponent for value, exponent in half.exponents.items()}
    return {"half": {"target": half.target.name, "exponents": exponents, "choices": choices}}


def _decoded_half(found: Any, graph: Graph) -> SavedHalf | None:
    if found is None:
        return None
    choices = {int(output): _decoded_choice(choice) for output, choice in found["choices"].items()}
    exponents = {int(value): int(exponent) for value, exponent in found["exponents"].items()}
    if any(node.output not in choices for node in graph.nodes) or any(abs(e) > _EXPONENTS for e in exponents.values()):
        raise CheckpointError(
            "the file's plan is damaged: a node has no engine in float32, or an exponent is too large"
        )
    return SavedHalf(target=str(found["target"]), exponents=exponents, float32=choices)


def _without_packed(made: Made) -> Graph:
    """Return a program's graph without the kept weights of layers whose matrices are written."""
    packed = {key[0] for key in made.packed.matrices}

    def bare(node: Node) -> Node:
        operation = node.operation
        return replace(node, operation=replace(operation, kept=None)) if isinstance(operation, Layer) else node

    nodes = tuple(bare(node) if node.output in packed else node for node in made.graph.nodes)
    return replace(made.graph, nodes=nodes)


def _plan_of_program(plan: Plan) -> Plan:
    """Return the plan of what a file holds: the fastest program, even where the model itself was faster still."""
    programs = {name: seconds for name, seconds in plan.candidates.items() if is_program(name)}
    return replace(plan, engine=min(programs, key=programs.__getitem__))


def _decoded_entry(found: Any, tensors: Mapping[str, Tensor]) -> Saved:
    leaves = [_decoded_leaf(leaf) for leaf in found["arguments"]["leaves"]]
    spec = decoded_spec(found["arguments"]["spec"])
    arguments, named = pytree.tree_unflatten(leaves, spec)
    packed = Packed()
    for part in found["matrices"]:
        key = (int(part["node"]), None if part["block"] is None else int(part["block"]), bool(part["narrow"]))
        packed.matrices[key] = decoded_matrix(part["matrix"], tensors)
    graph = decoded_graph(found["graph"], tensors)
    choices = {int(output): _decoded_choice(choice) for output, choice in found["choices"].items()}
    if any(node.output not in choices for node in graph.nodes):
        raise CheckpointError("the file's plan is damaged: a node has no engine")
    _check_weights(graph, packed)
    return Saved(
        call=Call(tuple(arguments), named, leaves, call_key(leaves, spec)),
        graph=graph,
        choices=choices,
        packed=packed,
        plan=Plan.from_json(found["plan"]),
        half=_decoded_half(found.get("half"), graph),
    )


def _check_weights(graph: Graph, packed: Packed) -> None:
    """Refuse a layer whose weight is nowhere, or of another size than the layer says."""
    sizes = {key[0]: matrix.rows * matrix.columns for key, matrix in packed.matrices.items()}
    for node in graph.layers():
        operation = node.operation
        assert isinstance(operation, Layer)
        if operation.kept is not None:
            fits = operation.kept.shape == tuple(operation.weight.shape)
        else:
            fits = not operation.weight.is_meta or sizes.get(node.output) == operation.weight.numel()
        if not fits:
            raise CheckpointError(f"the file's graph is damaged: the weight of {node.name} is not there")


def _encoded_choice(choice: Choice) -> Any:
    tilings = {name: _encoded_tiling(getattr(choice, name)) for name in ("tiling", "rows")}
    dense = {} if choice.dot is None else {"dot": choice.dot, "panels": _encoded_tiling(choice.panels)}
    return {"engine": choice.engine, **tilings, **dense, "seconds": dict(choice.seconds)}


def _encoded_tiling(tiling: Tiling) -> Any:
    return {"vectors": tiling.vectors, "block": tiling.block, "narrow": tiling.narrow}


def _decoded_choice(found: Any) -> Choice:
    if found["engine"] not in get_args(Engine) or (found["engine"] == "dense planes" and "dot" not in found):
        raise CheckpointError(f"the file names an engine {found['engine']!r} that this version does not know")
    tilings = {
        name: Tiling(vectors=part["vectors"], block=part["block"], narrow=bool(part["narrow"]))
        for name in ("tiling", "rows", "panels")
        if (part := found.get(name)) is not None
    }
    return Choice(engine=found["engine"], **tilings, dot=found.get("dot"), seconds=dict(found["seconds"]))


def _encoded_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    if isinstance(leaf, torch.dtype):
        return {"dtype": str(leaf).removeprefix("torch.")}
    return {"plain": leaf}


def _decoded_leaf(found: Any) -> Any:
    if "plain" in found:
        return found["plain"]
    dtype = getattr(torch, found["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the file names a dtype {found['dtype']!r} that PyTorch does not have")
    return torch.empty(found["shape"], dtype=dtype, device="meta") if "shape" in found else dtype


def _encoded_signature(signature: inspect.Signature) -> Any:
    return [
        {"name": part.name, "kind": part.kind.name, "optional": part.default is not part.empty}
        for part in signature.parameters.values()
    ]


def _decoded_signature(found: Any) -> inspect.Signature:
    """Return a signature that binds as the saved one; what its defaults are does not matter."""
    return inspect.Signature(
        [
            inspect.Parameter(
                part["name"], _KINDS[part["kind"]], default=None if part["optional"] else inspect.Parameter.empty
            )
            for part in found
        ]
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
