"""From a module and an example call to a `Graph`, by ``torch.export``."""

import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Node as FxNode

from sparsetwin.errors import UsageError
from sparsetwin.runtime._graph import (
    Convolution,
    GlobalMean,
    Graph,
    Layer,
    Linear,
    Node,
    Ref,
    Torch,
    Value,
    references,
)
from sparsetwin.runtime._kept_weights import KeptWeights
from sparsetwin.runtime._native import NATIVE, gives_back_argument, hides_view, schema_arguments
from sparsetwin.runtime._operations import functional

_BY_STRIDES = (  # what they return depends on how memory lies
    "aten.as_strided.default",
    "aten.view.dtype",
    "aten.view_as_complex.default",
)
_FOLDED = 1 << 22  # elements of a constant that is computed once instead of in each call
_PURE_IN_PLACE = ("aten.relu_.default", "aten.silu_.default", "aten.add_.Tensor")


@torch.no_grad()
def trace(
    model: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], *, kept: KeptWeights | None = None
) -> Graph:
    """Return what a model computes for arguments of these shapes.

    Args:
        model: In evaluation mode.
        arguments: Positional arguments of an example call.
        named: Keyword arguments.
        kept: Weights of the model whose numbers are not there, only kept.

    Raises:
        UsageError: If the model cannot be traced, with the cause.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, arguments, dict(named), strict=False)
            if not _is_functional(program):
                program = program.run_decompositions(_hidden_views(program))
        except Exception as error:  # torch.export raises whatever the model or a pass raises
            reason = str(error).strip().splitlines()
            raise UsageError(
                f"{type(model).__name__} cannot be traced by torch.export for this example: "
                f"{type(error).__name__}: {reason[0] if reason else ''}"
            ) from error
    return _Reader(program, KeptWeights() if kept is None else kept).graph()


def _hidden_views(program: ExportedProgram) -> dict[Any, Any]:
    """Return what takes apart the operations that may return a view unsaid: what is changed in place is seen then."""
    known = torch.export.default_decompositions()
    found = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {target: known[target] for target in found if target in known and hides_view(target)}


def _is_functional(program: ExportedProgram) -> bool:
    """Tell whether nothing is changed in place but what nobody else reads: a layer's result by its own activation."""
    made: set[FxNode] = set()  # anew in each call: not to be computed once and kept
    for node in program.graph.nodes:
        if node.name in program.graph_signature.user_inputs or not made.isdisjoint(node.all_input_nodes):
            made.add(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable:
            continue
        changed = node.args[0] if node.args else None
        pure = str(node.target) in _PURE_IN_PLACE or gives_back_argument(node.target, node.args, node.kwargs)
        if not pure or not isinstance(changed, FxNode):
            return False
        if changed.op != "call_function" or changed not in made or len(changed.users) != 1 or _may_alias(changed):
            return False
        if any(_dtype(part) != _dtype(changed) for part in node.args[1:] if isinstance(part, FxNode)):
            return False  # the result in place has another dtype than a new one
    return True


def _dtype(node: FxNode) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _may_alias(node: FxNode) -> bool:
    """Tell whether a node's result may share memory with another value."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or gives_back_argument(target, node.args, node.kwargs):
        return True
    returns = target._schema.returns
    return hides_view(target) or any(found.alias_info and not found.alias_info.is_write for found in returns)


class _Reader:
    """Turns a program into nodes, one for each operation that is not computed here and now."""

    def __init__(self, program: ExportedProgram, kept: KeptWeights) -> None:
        self.program, self.kept = program, kept
        self.known: dict[FxNode, Any] = {}  # a Ref, a constant, or a tuple of which only parts are used
        self.values: dict[int, Value | None] = {}
        self.nodes: list[Node] = []
        self.blocked: set[int] = set()  # values whose channels may lie last, as dense convolutions leave them

    def graph(self) -> Graph:
        inputs = self._read_placeholders()
        outputs: tuple[Any, ...] = ()
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self.known[node] = _attribute(self.program.graph_module, str(node.target))
            elif node.op == "call_function":
                self._read_call(node)
            elif node.op == "output":
                outputs = tuple(self.kept.real(self._as_in_model(leaf)) for leaf in node.args[0])
        for spec in self.program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                what = "input" if spec.kind is OutputKind.USER_INPUT_MUTATION else "buffer"
                raise UsageError(
                    f"the model changes its {what} {spec.target} in a call; deploy takes models that do not"
                )
        return Graph(
            nodes=tuple(self.nodes),
            values=self.values,
            inputs=inputs,
            outputs=outputs,
            out_spec=self.program.call_spec.out_spec,
        )

    def _read_placeholders(self) -> tuple[int | None, ...]:
        inputs: list[int | None] = []
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(spec.arg, ConstantArgument):
                    self.known[node] = spec.arg.value
                    inputs.append(None)
                else:
                    inputs.append(self._new_value(node))
                continue
            assert spec.target is not None
            state, constants = self.program.state_dict, self.program.constants
            found = state[spec.target] if spec.target in state else constants[spec.target]
            self.known[node] = found.detach() if isinstance(found, Tensor) else found
        return tuple(inputs)

    def _new_value(self, node: FxNode) -> int:
        meta = node.meta.get("val")
        number = len(self.values)
        self.values[number] = (
            Value(shape=tuple(int(size) for size in meta.shape), dtype=meta.dtype) if isinstance(meta, Tensor) else None
        )
        self.known[node] = Ref(value=number)
        return number

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, FxNode):
            return self.known[argument]
        if isinstance(argument, (tuple, list)):
            return (
                type(argument)(self._argument(part) for part in argument)
                if type(argument) is tuple
                else [self._argument(part) for part in argument]
            )
        if isinstance(argument, Mapping):
            return {name: self._argument(part) for name, part in argument.items()}
        return argument

    def _as_in_model(self, leaf: Any) -> Any:
        """Return an argument or a result: made contiguous if it is in the model, and channels may lie last here."""
        found, meta = self._argument(leaf), leaf.meta.get("val") if isinstance(leaf, FxNode) else None
        if not isinstance(found, Ref) or found.value not in self.blocked:
            return found
        if not isinstance(meta, Tensor) or not meta.is_contiguous():
            return found
        number = len(self.values)
        self.values[number] = self.values[found.value]
        operation = Torch(function=torch.ops.aten.contiguous.default, arguments=(found,))
        self.nodes.append(Node(name=_layer_name(leaf), operation=operation, inputs=(found.value,), output=number))
        return Ref(value=number)

    def _append(self, node: FxNode, operation: Any, read: tuple[int, ...], output: int) -> None:
        inherits = not isinstance(operation, Linear | GlobalMean) and not self.blocked.isdisjoint(read)
        if isinstance(operation, Convolution) or inherits:
            self.blocked.add(output)
        self.nodes.append(Node(name=_layer_name(node), operation=operation, inputs=read, output=output))

    def _read_call(self, node: FxNode) -> None:
        arguments, named = self._argument(tuple(node.args)), self._argument(dict(node.kwargs))
        target: Any = node.target
        if str(target) in _BY_STRIDES:
            arguments = (self._as_in_model(node.args[0]), *arguments[1:])
        if target is operator.getitem and isinstance(arguments[0], tuple):
            if node.users:
                self.known[node] = arguments[0][arguments[1]]
            return
        if next(references((arguments, named)), None) is None and _foldable(node):
            self.known[node] = self._folded(node, arguments, named)
            return
        if gives_back_argument(target, arguments, named):
            self.known[node] = arguments[0]
            return
        if not node.users and not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return  # an assertion about shapes, which are fixed here
        operation: Any = None
        read: tuple[int, ...] = ()
        several = isinstance(node.meta.get("val"), (tuple, list))
        if str(target) in NATIVE and not (several and _uses_others(node)):
            operation, read = NATIVE[str(target)](schema_arguments(target, arguments, named), self.values) or (None, ())
        native = operation is not None
        if isinstance(operation, Layer):
            operation = self.kept.layer(operation)
        elif operation is None:
            operation = Torch(
                function=functional(target), arguments=self.kept.real(arguments), named=self.kept.real(named)
            )
            read = tuple(dict.fromkeys(references((arguments, named))))
        if several and native:  # it makes the first of several results, the only one that is used
            self._read_first(node, operation, read)
        else:
            self._append(node, operation, read, self._new_value(node))

    def _folded(self, node: FxNode, arguments: Any, named: Any) -> Any:
        """Return an operation's result on constants; a view of a weight without numbers is one too, a copy is not."""
        target: Any = node.target
        if _may_alias(node):
            found = target(*arguments, **named)
            if not self.kept or self.kept.stands_in(found):
                return found
        return target(*self.kept.real(arguments), **self.kept.real(named))

    def _read_first(self, node: FxNode, operation: Any, read: tuple[int, ...]) -> None:
        first = next(user for user in node.users if user.target is operator.getitem and user.args[1] == 0)
        output = self._new_value(first)
        self.known[node] = (Ref(value=output),)
        self._append(node, operation, read, output)


def _uses_others(node: FxNode) -> bool:
    """Tell whether other results of a node are used than the first, such as where a maximum was; or none."""
    used = [user for user in node.users if user.users]
    return not used or any(user.target is not operator.getitem or user.args[1] != 0 for user in used)


def _foldable(node: FxNode) -> bool:
    """Tell whether an operation on constants always gives the same, small result."""
    target, meta = node.target, node.meta.get("val")
    if not isinstance(meta, Tensor) or meta.numel() > _FOLDED or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _layer_name(node: FxNode) -> str:
    """Return the path of the module that a node comes from, or its own name."""
    stack = node.meta.get("nn_module_stack")
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path or node.name
