"""`load`: a deployed network from its file, without the model's code."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from sparsetwin.errors import CheckpointError, UsageError
from sparsetwin.kernels import Target
from sparsetwin.runtime._calls import Call, plain_mode
from sparsetwin.runtime._choices import Choice, Choices, make_program
from sparsetwin.runtime._deployed import Deployed
from sparsetwin.runtime._entries import (
    Entry,
    Made,
    dots_are_here,
    make,
    make_programs,
    near_float32,
    threads_of,
    unpacked,
    with_program,
)
from sparsetwin.runtime._file import Saved, SavedHalf, read_file
from sparsetwin.runtime._graph import Add, Graph, Layer, Node, Value
from sparsetwin.runtime._half import Half, half_target_if
from sparsetwin.runtime._half_programs import HalfPrograms, half_programs
from sparsetwin.runtime._machine import checked_threads, kernels_run, machine
from sparsetwin.runtime._plain import apply, run_plain, values_of
from sparsetwin.runtime._plan import Plan
from sparsetwin.runtime._products import Packed
from sparsetwin.runtime._reduced import dense_planes
from sparsetwin.runtime._rivals import Runner
from sparsetwin.runtime._sizes import Axes, changed_axes, numbers_of_unknown_origin, operations_of_one_size
from sparsetwin.runtime._timing import race

_ROUNDS = 3


def load(path: str | Path, *, threads: int | None = None) -> Deployed:
    """Return the network that `Deployed.save` wrote, without the model's code.

    The file is mapped into memory, so that processes that load it share its weights. If it comes from another
    processor, or another number of threads is asked for, all is measured again. A network of convolutions takes new
    sizes, as when it was deployed, where `save` found that none of its operations depends on them; one with other
    operations takes the shapes that were planned before it was saved.

    Args:
        path: The file.
        threads: Of the kernels; as when it was saved by default.

    Raises:
        CheckpointError: If the file is missing, damaged, foreign or of another version.
        ConfigError: If ``threads`` is no whole number, or less than one.
    """
    threads = None if threads is None else checked_threads(threads, default=1)
    return loaded(Path(path), threads=threads, half=half_target_if(allowed=True))


def loaded(path: Path, *, threads: int | None, half: Target | None) -> Deployed:
    """Return the network of a file; plans that were made with a target of float16 arithmetic take ``half`` for it."""
    file = read_file(path)
    shapes = file.shapes
    number = shapes[0].plan.threads if threads is None else threads
    source = FileSource(name=file.name, signature=file.signature, threads=number, half=half, axes=file.axes)
    try:
        with plain_mode():
            source.entries = tuple(source.restored(saved) for saved in shapes)
    except (ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its plan does not fit its weights: {error}") from error
    return Deployed(source, source.entries)


@dataclass(kw_only=True, eq=False)
class FileSource:
    """Plans calls by what a file holds."""

    name: str
    signature: inspect.Signature
    threads: int
    entries: tuple[Entry, ...] = ()
    half: Target | None = None  # with float16 arithmetic, for plans that were made with it
    axes: Axes | None = None  # of the first entry's call, whose sizes may change; None: not known

    def restored(self, saved: Saved) -> Entry:
        """Return a saved plan as it was; measured again if this machine or the number of threads is another one."""
        here = kernels_run() and (saved.plan.machine, saved.plan.threads) == (machine(), self.threads)
        half = self._half(saved.half)
        if here and dots_are_here(saved.choices) and (saved.half is None) == (half is None):
            threads, packed = threads_of(saved.plan), replace(saved.packed, half=half)
            program = make_program(saved.graph, saved.choices, packed=packed, threads=threads)
            float32 = None if saved.half is None else saved.half.float32
            made = Made(program=program, graph=saved.graph, choices=saved.choices, packed=packed, float32=float32)
            return Entry(call=saved.call, run=made.run, plan=saved.plan, program=made)
        allowed = saved.choices if saved.half is None else saved.half.float32
        return self._measured(saved.call, unpacked(saved.graph, saved.packed), {}, like=allowed, half=half)

    def _half(self, saved: SavedHalf | None) -> Half | None:
        """Return how to compute in float16 as a saved program does, if this machine can."""
        if saved is None or self.half is None or self.half.name != saved.target:
            return None
        return Half(target=self.half, exponents=saved.exponents)

    def entry(self, call: Call, like: Entry | None = None) -> Entry:
        """Plan a call of new sizes.

        Raises:
            UsageError: If the network has operations that hold sizes, or may hold them, or the call is one of another
                kind.
        """
        made = self._like(like)
        reason = self._refusal(call, made.graph)
        if reason is not None:
            known = "; ".join(entry.call.describe() for entry in self.entries)
            raise UsageError(
                f"this {self.name} was loaded from a file with plans for {known}; got {call.describe()}"
                f"{reason}. Deploy the model, call prepare for each shape, and save again"
            )
        graph = resized(unpacked(made.graph, made.packed), call)
        if made.packed.half is None or made.float32 is None:
            return self._measured(call, graph, made.choices, like=made.choices)
        return self._measured(
            call, graph, made.float32, like=made.float32, half=made.packed.half, half_choices=made.choices
        )

    def _refusal(self, call: Call, graph: Graph) -> str | None:
        """Return why a call of new sizes cannot be planned, to be added to a message; None if it can."""
        planned = self.entries[0].call
        if call.key is None or not _same_kind(call, planned):
            return ""
        held = operations_of_one_size(graph)
        if held:
            return f"; its operations {', '.join(held)} hold sizes"
        if self.axes is not None:
            fixed = {
                axis
                for changed, free in zip(changed_axes(call, planned), self.axes, strict=True)
                for axis in set(changed) - set(free)
            }
            return f"; it does not take other sizes of axis {', '.join(map(str, sorted(fixed)))}" if fixed else None
        numbers = numbers_of_unknown_origin(graph)
        return f"; its operations {', '.join(numbers)} have numbers that may be sizes" if numbers else None

    def free_axes(self, entry: Entry) -> Axes | None:
        """Return the axes whose sizes may change, as the file tells."""
        return self.axes

    def reference(self, call: Call) -> Any:
        """Return what the network's dense operations make of a call; its weights are unpacked for that."""
        known = next((entry for entry in self.entries if entry.call.key == call.key), None)
        made = self._like(known or self.entries[0])
        graph = unpacked(made.graph, made.packed)
        leaves = run_plain(graph, call.leaves)
        return leaves[0] if graph.out_spec is None else pytree.tree_unflatten(leaves, graph.out_spec)

    def without_plan(self, call: Call) -> Runner | None:
        """Return None: without the model there is no other way."""
        return None

    def swapped(self) -> nn.Module:
        """Refuse: there is no model.

        Raises:
            UsageError: Always.
        """
        return self._no_model()

    def _no_model(self) -> NoReturn:
        raise UsageError(f"this {self.name} was loaded from a file, which holds no model; deploy the model for that")

    def _like(self, entry: Entry | None) -> Made:
        made = (entry or self.entries[0]).program
        assert made is not None, "only entries with a program are saved"
        return made

    def _measured(
        self,
        call: Call,
        graph: Graph,
        choices: Choices,
        *,
        like: Choices | None = None,
        half: Half | None = None,
        half_choices: Choices | None = None,
    ) -> Entry:
        """Return the fastest program for a graph; bfloat16 is allowed again where it was measured in ``like``."""
        bfloat16 = None
        halves = HalfPrograms()
        filled = replace(call, leaves=_random_leaves(call))
        if kernels_run():
            allowed = like is not None and any(choice.dot is not None for choice in like.values())
            bfloat16 = dense_planes(allowed=allowed)
            programs = make_programs(graph, choices, threads=self.threads, bfloat16=bfloat16)
            programs = near_float32(programs, filled, bfloat16)
            if half is not None:
                halves = half_programs(
                    graph,
                    next(iter(programs.values())),
                    half,
                    threads=self.threads,
                    examples=[filled.leaves],
                    choices=half_choices,
                    bfloat16=bfloat16,
                )
                programs |= halves.made
        else:
            dense = {node.output: Choice(engine="dense") for node in graph.nodes}
            programs = {"dense graph": make(graph, dense, packed=Packed(), threads=self.threads)}
        runners = {name: partial(made.run, filled) for name, made in programs.items()}
        skipped = dict(halves.skipped)
        seconds = race(runners, rounds=_ROUNDS, threads=self.threads, skipped=skipped)
        fastest = min(seconds, key=seconds.__getitem__)
        plan = Plan(
            machine=machine(),
            threads=self.threads,
            inputs=call.describe(),
            engine=fastest,
            candidates=seconds,
            skipped=skipped,
            notes=(*(() if bfloat16 is None else bfloat16.notes), *halves.notes),
        )
        entry = Entry(call=call.without_numbers(), run=programs[fastest].run, plan=plan)
        return with_program(entry, graph, {name: programs[name] for name in seconds}, seconds)


def _random_leaves(call: Call) -> list[Any]:
    """Return leaves of a call with normal numbers where they are float, and zeros where they are not."""
    generator = torch.Generator().manual_seed(0)

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point():
            return torch.zeros_like(leaf, device="cpu")
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu").to(leaf.dtype)

    return [filled(leaf) for leaf in call.leaves]


def resized(graph: Graph, call: Call) -> Graph:
    """Return a graph for a call of other sizes, none of which its operations hold.

    Raises:
        UsageError: If the operations do not take these sizes.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        bare = replace(graph, nodes=tuple(_without_numbers(node) for node in graph.nodes))
        leaves = [
            torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu") if isinstance(leaf, Tensor) else leaf
            for leaf in call.leaves
        ]
        try:
            found = values_of(bare, leaves)
            _check_sums(bare, found)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(f"the network does not take {call.describe()}: {error}") from error
    values = {
        number: Value(shape=tuple(value.shape), dtype=value.dtype) if isinstance(value, Tensor) else None
        for number, value in found.items()
    }
    return replace(graph, values={**graph.values, **values})


def _check_sums(graph: Graph, values: Mapping[int, Any]) -> None:
    """Refuse sizes with which values are added that were of one shape and no longer are; kernels do not broadcast.

    Raises:
        ValueError: If there are such values.
    """
    for node in graph.nodes:
        operation = node.operation
        if isinstance(operation, Layer) and operation.residual:
            summands = [apply(replace(operation, residual=False), [values[node.inputs[0]]]), values[node.inputs[1]]]
        elif isinstance(operation, Add):
            summands = [values[value] for value in node.inputs]
        else:
            continue
        first, second = (tuple(value.shape) for value in summands)
        if first != second:
            raise ValueError(f"{node.name} adds values of one shape, which are {first} and {second} now")


def _without_numbers(node: Node) -> Node:
    """Return a layer with a weight of its shape on the CPU, as this mode makes them: without numbers."""
    operation = node.operation
    if not isinstance(operation, Layer) or not operation.weight.is_meta:
        return node
    weight = torch.empty(operation.weight.shape, dtype=torch.float32, device="cpu")
    return replace(node, operation=replace(operation, weight=weight, kept=None))


def _same_kind(call: Call, planned: Call) -> bool:
    """Tell whether two calls differ in the sizes of tensors only."""
    if call.key[0] != planned.key[0]:
        return False
    return all(
        (a.dtype, a.dim()) == (b.dtype, b.dim()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(call.leaves, planned.leaves, strict=True)
    )
