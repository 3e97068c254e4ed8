"""Graphs as JSON and named tensors, and back. Operations are named, never code; every name is checked when read."""

import hashlib
import json
import operator
import re
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsetwin.errors import CheckpointError, ConfigError, UsageError
from sparsetwin.kernels import CSRBlocks, KeptWeight
from sparsetwin.runtime._graph import (
    Activate,
    Add,
    Affine,
    Convolution,
    GlobalMean,
    Graph,
    Linear,
    MaxPool,
    Node,
    Operation,
    Ref,
    Torch,
    Value,
)
from sparsetwin.runtime._operations import is_allowed

Json = Any
_PADDING = 16  # elements behind an array that kernels may read
_OPERATIONS: dict[str, type] = {
    kind.__name__: kind for kind in (Convolution, Linear, Affine, Add, Activate, MaxPool, GlobalMean)
}
_ATEN = re.compile(r"aten\.(\w+)\.(\w+)")
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


class Store:
    """Tensors by their content, so that what several shapes share is kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def put(self, tensor: Tensor) -> str:
        """Take a tensor; return its name."""
        tensor = tensor.detach().contiguous()
        content = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        name = hashlib.sha256(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        name.update(content)
        found = name.hexdigest()[:32]
        self.tensors.setdefault(found, tensor)
        return found


def encoded_graph(graph: Graph, store: Store) -> Json:
    """Return a graph as JSON; its tensors go to the store, those without numbers (on the meta device) stay out.

    Raises:
        UsageError: If an operation is not one of PyTorch's own.
    """
    return {
        "nodes": [
            {
                "name": node.name,
                "operation": _encoded_operation(node.operation, store),
                "inputs": list(node.inputs),
                "output": node.output,
            }
            for node in graph.nodes
        ],
        "values": {
            str(number): None if value is None else {"shape": list(value.shape), "dtype": str(value.dtype)[6:]}
            for number, value in graph.values.items()
        },
        "inputs": list(graph.inputs),
        "outputs": [_encoded(leaf, store) for leaf in graph.outputs],
        "result": None if graph.out_spec is None else encoded_spec(graph.out_spec),
    }


def encoded_spec(spec: pytree.TreeSpec) -> str:
    """Return the structure of arguments or results as text.

    Raises:
        UsageError: If it has a container that PyTorch cannot name.
    """
    try:
        text = pytree.treespec_dumps(spec)
        _check_structure(json.loads(text)[1])
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UsageError(f"the structure of the arguments or the result cannot be saved: {error}") from error
    return text


def decoded_spec(text: Any) -> pytree.TreeSpec:
    """Return what `encoded_spec` wrote.

    Raises:
        CheckpointError: If it is damaged, or a container's class is not known to PyTorch, or would be looked for in a
            module that the text names.
    """
    try:
        protocol, structure = json.loads(text)
        _check_structure(structure)
        return pytree.treespec_loads(json.dumps([protocol, structure]))
    except Exception as error:
        raise CheckpointError(
            f"the structure of arguments or results cannot be read: {error}. "
            "If it names a class, import the module that defines it first"
        ) from error


def _check_structure(found: Json) -> None:
    """Refuse a structure for which PyTorch would import a module that its text names.

    Allowed are containers that PyTorch knows here, with plain keys: those of its own, and classes of modules that the
    program has imported.

    Raises:
        ValueError: If there is another one.
    """
    kind, context, parts = found["type"], found["context"], found["children_spec"]
    if not isinstance(parts, list):
        raise ValueError("a container's parts are no list")
    if kind is None:
        if context is not None or parts:
            raise ValueError("a container without a class")
        return
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    if kind not in known or kind == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
        raise ValueError(f"the class {kind} is not known")
    if known[kind] is namedtuple:
        if not pytree.is_namedtuple_class(known.get(context, object)):
            raise ValueError(f"the named tuple {context} is not known")
    elif pytree.SUPPORTED_SERIALIZED_TYPES[known[kind]].from_dumpable_context is not None:
        raise ValueError(f"a {kind} cannot be in a file")
    elif not _is_plain(json.loads(context)):
        raise ValueError(f"a {kind} with other keys than plain ones cannot be in a file")
    for part in parts:
        _check_structure(part)


def _is_plain(keys: Json) -> bool:
    """Tell whether a container's keys are numbers, texts, or none at all."""
    return all(
        key is None or isinstance(key, (bool, int, float, str)) for key in (keys if isinstance(keys, list) else [keys])
    )


def decoded_graph(found: Json, tensors: Mapping[str, Tensor]) -> Graph:
    """Return what `encoded_graph` wrote.

    Raises:
        CheckpointError: If anything is missing, unknown, or out of order.
    """
    try:
        values = {
            int(number): None
            if value is None
            else Value(shape=tuple(map(int, value["shape"])), dtype=_dtype(value["dtype"]))
            for number, value in found["values"].items()
        }
        nodes = tuple(
            Node(
                name=str(node["name"]),
                operation=_decoded_operation(node["operation"], tensors),
                inputs=tuple(map(int, node["inputs"])),
                output=int(node["output"]),
            )
            for node in found["nodes"]
        )
        graph = Graph(
            nodes=nodes,
            values=values,
            inputs=tuple(None if value is None else int(value) for value in found["inputs"]),
            outputs=tuple(_decoded(leaf, tensors) for leaf in found["outputs"]),
            out_spec=None if found["result"] is None else decoded_spec(found["result"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the file's graph is damaged or of another version: {error!r}") from error
    _check_order(graph)
    return graph


def _check_order(graph: Graph) -> None:
    there = {value for value in graph.inputs if value is not None}
    for node in graph.nodes:
        if not there.issuperset(node.inputs) or node.output in there or node.output not in graph.values:
            raise CheckpointError(f"the file's graph is damaged: {node.name} reads what is not there")
        there.add(node.output)
    if not there.issuperset(graph.results()):
        raise CheckpointError("the file's graph is damaged: it returns what is not there")


def encoded_matrix(matrix: CSRBlocks, store: Store) -> Json:
    """Return packed weights as JSON and tensors."""

    def padded(array: Tensor) -> Tensor:
        return torch.cat([array, array.new_zeros(_PADDING)])

    return {
        "rows": matrix.rows,
        "columns": matrix.columns,
        "block_columns": matrix.block_columns,
        "bits": store.put(matrix.bits),
        "values": store.put(padded(matrix.values)),
        "scales": None if matrix.scales is None else store.put(matrix.scales),
    }


def decoded_matrix(found: Json, tensors: Mapping[str, Tensor]) -> CSRBlocks:
    """Return what `encoded_matrix` wrote, on the memory of the file; where weights lie is what its bits say.

    Raises:
        CheckpointError: If an array does not fit the others.
    """
    try:
        rows, columns, width = (int(found[name]) for name in ("rows", "columns", "block_columns"))
        bits, values = tensors[found["bits"]], tensors[found["values"]]
        scales = None if found["scales"] is None else tensors[found["scales"]]
        if values.dim() != 1 or values.numel() < _PADDING:
            raise ConfigError(f"values of shape {tuple(values.shape)}")
        values = values[: values.numel() - _PADDING]
        return CSRBlocks.from_parts((rows, columns), bits=bits, values=values, scales=scales, block_columns=width)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the file's packed weights are damaged: {error}") from error


def _encoded_operation(operation: Operation, store: Store) -> Json:
    if isinstance(operation, Torch):
        named = _encoded(dict(operation.named), store)
        return {
            "kind": "Torch",
            "function": _function_name(operation.function),
            "arguments": _encoded(tuple(operation.arguments), store),
            "named": named,
        }
    plain = {part.name: _encoded(getattr(operation, part.name), store) for part in fields(operation)}
    return {"kind": type(operation).__name__, **plain}


def _decoded_operation(found: Json, tensors: Mapping[str, Tensor]) -> Operation:
    if found["kind"] == "Torch":
        return Torch(
            function=_function(found["function"]),
            arguments=_decoded(found["arguments"], tensors),
            named=_decoded(found["named"], tensors),
        )
    if found["kind"] not in _OPERATIONS:
        raise CheckpointError(f"the file has an operation {found['kind']!r} that this version does not know")
    plain = {name: _decoded(part, tensors) for name, part in found.items() if name != "kind"}
    made: Operation = _OPERATIONS[found["kind"]](**plain)
    return made


def _function_name(function: Any) -> str:
    if not is_allowed(function):
        raise UsageError(f"a network with the operation {function} cannot be saved; save the model itself")
    return "getitem" if function is operator.getitem else str(function)


def _function(name: Any) -> Callable[..., Any]:
    """Return the operation of a name: of PyTorch's own, and one that a file may name."""
    if name == "getitem":
        return operator.getitem
    match = _ATEN.fullmatch(str(name))
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    found = getattr(packet, match[2], None) if match and packet is not None else None
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        raise CheckpointError(f"the file names an operation {name!r} that is not one of PyTorch's")
    if not is_allowed(found):
        raise CheckpointError(f"the file names an operation {name!r} that is not one of those a file may name")
    return found


def _encoded(found: Any, store: Store) -> Json:
    if isinstance(found, Ref):
        return {"value": found.value}
    if isinstance(found, Tensor):
        if found.is_meta:
            return {"packed": list(found.shape)}
        return {"tensor": store.put(found)}
    if isinstance(found, KeptWeight):
        scales = None if found.scales is None else store.put(found.scales)
        parts = {"shape": list(found.shape), "bits": store.put(found.bits), "values": store.put(found.values)}
        return {"kept": {**parts, "scales": scales}}
    if isinstance(found, (tuple, list)):
        return {type(found).__name__: [_encoded(part, store) for part in found]}
    if isinstance(found, Mapping):
        return {"dict": {str(name): _encoded(part, store) for name, part in found.items()}}
    for name, kind in _NAMED.items():
        if isinstance(found, kind):
            return {name: str(found).removeprefix("torch.")}
    if isinstance(found, torch.device):
        return {"device": str(found)}
    if isinstance(found, float):
        return {"float": found.hex() if abs(found) < float("inf") else repr(found)}
    if found is None or isinstance(found, (bool, int, str)):
        return found
    raise UsageError(f"a network with an argument {found!r} cannot be saved; save the model itself")


def _decoded(found: Json, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(found, Mapping):
        return found
    ((kind, content),) = found.items()
    match kind:
        case "value":
            return Ref(value=int(content))
        case "tensor":
            return tensors[content]
        case "packed":
            return torch.empty(tuple(map(int, content)), dtype=torch.float32, device="meta")
        case "kept":
            return KeptWeight(
                shape=tuple(map(int, content["shape"])),
                bits=tensors[content["bits"]],
                values=tensors[content["values"]],
                scales=None if content["scales"] is None else tensors[content["scales"]],
            )
        case "tuple":
            return tuple(_decoded(part, tensors) for part in content)
        case "list":
            return [_decoded(part, tensors) for part in content]
        case "dict":
            return {str(name): _decoded(part, tensors) for name, part in content.items()}
        case "device":
            return torch.device("cpu")
        case "float":
            return float(content) if content in ("inf", "-inf", "nan") else float.fromhex(content)
    if kind not in _NAMED:
        raise CheckpointError(f"the file has an argument of an unknown kind {kind!r}")
    constant = getattr(torch, str(content), None)
    if not isinstance(constant, _NAMED[kind]):
        raise CheckpointError(f"the file names a {kind} {content!r} that PyTorch does not have")
    return constant


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the file names a dtype {name!r} that PyTorch does not have")
    return found
