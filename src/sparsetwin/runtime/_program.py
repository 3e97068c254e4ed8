"""A graph compiled for its shapes and this machine: segments of kernels on planes, and tensor steps between them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsetwin.kernels import DenseConvolution, Panels, PlaneLayout, Pool, SparseConvolution
from sparsetwin.runtime._graph import Graph, Node, Ref, Torch, filled
from sparsetwin.runtime._half import Half
from sparsetwin.runtime._layouts import lay_out
from sparsetwin.runtime._lowering import Form, Lowered, lower
from sparsetwin.runtime._memory import Memory, Part, Segment, plan_memory
from sparsetwin.runtime._plain import torch_function
from sparsetwin.runtime._segments import Bound, PlaneKernel, bind_all, panel_bytes
from sparsetwin.runtime._serial import is_small, serial
from sparsetwin.runtime._sheets import Sheet
from sparsetwin.runtime._steps import (
    Mean,
    Pack,
    Product,
    Step,
    TensorStep,
    Unpack,
    sheets_read,
    sheets_written,
    values_read,
    values_written,
)
from sparsetwin.runtime._steps import Pool as PoolStep
from sparsetwin.runtime._tensors import Tensors, lasting_results, plan_tensors

Function = Callable[..., Any]
Maker = Callable[[Product, Any, Any], SparseConvolution | DenseConvolution]


class Program:
    """What runs a graph. Calls may run at once: each takes a workspace of its own.

    Args:
        graph: The network.
        forms: For each node's output, whether it works on planes or on tensors.
        product: Makes the kernel of a step for two layouts.
        function: Returns what runs a node on tensors; not asked for `Torch` operations.
        threads: Of the kernels; images are shared among them, or the work of one image.
        half: How planes are float16; float32 if None.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        forms: Mapping[int, Form],
        product: Maker,
        function: Callable[[Any], Function],
        threads: int = 1,
        half: Half | None = None,
    ) -> None:
        self.graph, self.threads = graph, threads
        lowered = lower(graph, forms)
        self.sheets = lowered.sheets if half is None else _scaled(lowered, half.factors())
        self.layouts = lay_out(lowered, torch.float32 if half is None else torch.float16)
        self.parts = _parts(lowered.steps, self.sheets)
        self.memory: Memory = plan_memory(self.parts, self.layouts)
        self.kernels: dict[Step, PlaneKernel] = {}
        self.functions: dict[int, Function] = {}
        self.torch: dict[int, Callable[[Mapping[int, Any]], Any]] = {}
        for step in lowered.steps:
            if isinstance(step, Product):
                self.kernels[step] = product(step, self.layouts[step.source], self.layouts[step.sheet])
            elif isinstance(step, PoolStep):
                self.kernels[step] = step.kernel(self.layouts)
            elif isinstance(step, TensorStep) and isinstance(step.node.operation, Torch):
                self.torch[step.node.output] = self._shared(step.node, torch_function(step.node.operation))
            elif isinstance(step, TensorStep):
                self.functions[step.node.output] = self._shared(step.node, function(step.node))
        self.panel_bytes = panel_bytes(self.kernels.values())
        self.pool = Pool(threads) if threads > 1 else None
        self._free: deque[Workspace] = deque()  # append and pop are atomic
        self._dropped = _last_uses(self.parts, graph)
        self.tensors: Tensors = plan_tensors(self.parts, graph)
        self._lasting = lasting_results(graph)

    def _shared(self, node: Node, run: Function) -> Function:
        """Return what runs a node on tensors, on one of PyTorch's threads if kernels have several and it is small."""
        return serial(run) if self.threads > 1 and is_small(node, self.graph.values) else run

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves of the result for the leaves of a call, none of which requires a gradient."""
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace(self)
        try:
            return workspace.run(leaves)
        finally:
            self._free.append(workspace)

    def workspace_bytes(self) -> int:
        """Return the size of one workspace."""
        images = {sheet: self.sheets[sheet].images for sheet in self.memory.whole}
        tensors = sum(4 * torch.Size(buffer.shape).numel() for buffer in self.tensors.buffers)
        whole = sum(_size(self.layouts[sheet]) * count for sheet, count in images.items())
        return tensors + whole + self.panel_bytes + sum(_size(layout) for layout in self.memory.buffers)


class Workspace:
    """Memory of one call, and the kernels bound to it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._whole = {
            sheet: program.layouts[sheet].empty(program.sheets[sheet].images) for sheet in program.memory.whole
        }
        self._tensors = [buffer.empty() for buffer in program.tensors.buffers]
        self._slots: list[list[Tensor]] = []
        self._panels: list[Panels] = []
        self._bound: dict[tuple[int, int, int, bool], list[Bound]] = {}
        self._written = [
            [value for step in part.steps for value in values_written(step)] if isinstance(part, Segment) else []
            for part in program.parts
        ]
        self._crossing = [
            isinstance(part, Segment)
            and any(
                sheet in program.memory.whole
                for step in part.steps
                for sheet in (*sheets_read(step), *sheets_written(step))
            )
            for part in program.parts
        ]

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        program = self.program
        values: dict[int, Any] = {
            value: leaf for value, leaf in zip(program.graph.inputs, leaves, strict=True) if value is not None
        }
        for number, part in enumerate(program.parts):
            if isinstance(part, Segment):
                self._run_segment(number, part, values)
            else:
                node = part.node
                if node.output in program.torch:
                    values[node.output] = program.torch[node.output](values)
                else:
                    values[node.output] = program.functions[node.output](*[values[value] for value in node.inputs])
            for value in program._dropped[number]:
                del values[value]
        results = [filled(leaf, values) for leaf in program.graph.outputs]
        for place in program._lasting:
            if isinstance(results[place], Tensor):
                results[place] = results[place].clone()
        return results

    def _run_segment(self, number: int, segment: Segment, values: dict[int, Any]) -> None:
        program = self.program
        for value in self._written[number]:
            values[value] = self._tensor(value)
        threads, image = program.threads, 0
        if threads > 1 and program.pool is not None:
            whole_rounds = segment.images - segment.images % threads
            if whole_rounds:
                bound = [
                    [(at, self._bind(number, segment, slot, at, False)) for at in range(slot, whole_rounds, threads)]
                    for slot in range(threads)
                ]
                program.pool.run([_images(work, values) for work in bound])
            image = whole_rounds
        for rest in range(image, segment.images):
            for run in self._bind(number, segment, 0, rest, True):
                run(values, rest)

    def _tensor(self, value: int) -> Tensor:
        tensors = self.program.tensors
        return self._tensors[tensors.kept[value]] if value in tensors.kept else tensors.fresh[value].empty()

    def _bind(self, number: int, segment: Segment, slot: int, image: int, shared: bool) -> list[Bound]:
        """Return a segment's steps on the memory of a slot; ``shared`` cuts each for all threads."""
        key = (number, slot, image if self._crossing[number] else 0, shared)
        if key not in self._bound:
            program = self.program
            while len(self._slots) <= slot:
                self._slots.append([layout.empty(1) for layout in program.memory.buffers])
                self._panels.append(Panels(program.panel_bytes))

            def planes(sheet: int) -> Tensor:
                if sheet in program.memory.whole:
                    return self._whole[sheet][image : image + 1]
                return self._slots[slot][program.memory.local[sheet]]

            self._bound[key] = bind_all(
                segment.steps,
                sheets=program.sheets,
                layouts=program.layouts,
                planes=planes,
                kernels=program.kernels,
                panels=self._panels[slot],
                threads=program.threads,
                pool=program.pool if shared else None,
            )
        return self._bound[key]


def _size(layout: PlaneLayout) -> int:
    return layout.elements * layout.dtype.itemsize


def _scaled(lowered: Lowered, factors: Mapping[int, float]) -> dict[int, Sheet]:
    """Return sheets that know their factor where tensors go in or come out."""
    sheets = dict(lowered.sheets)
    for step in lowered.steps:
        if isinstance(step, Pack | Unpack):
            sheets[step.sheet] = replace(sheets[step.sheet], factor=factors.get(step.value, 1.0))
        elif isinstance(step, Mean):
            sheets[step.source] = replace(sheets[step.source], factor=factors.get(step.node.inputs[0], 1.0))
    return sheets


def _images(work: list[tuple[int, list[Bound]]], values: dict[int, Any]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for image, steps in work:
                for step in steps:
                    step(values, image)

    return run


def _parts(steps: Sequence[Step], sheets: Mapping[int, Any]) -> tuple[Part, ...]:
    """Cut steps into tensor steps and segments of equally many images."""
    parts: list[Part] = []
    waiting: list[Step] = []
    images = 0

    def close() -> None:
        if waiting:
            parts.append(Segment(steps=tuple(waiting), images=images))
            waiting.clear()

    for step in steps:
        if isinstance(step, TensorStep):
            close()
            parts.append(step)
            continue
        (sheet, *_) = (*sheets_written(step), *sheets_read(step))
        if waiting and (sheets[sheet].images != images or _needs_all(step, waiting)):
            close()
        images = sheets[sheet].images
        waiting.append(step)
    close()
    return tuple(parts)


def _needs_all(step: Step, segment: Sequence[Step]) -> bool:
    """Tell whether a step packs a tensor that the segment itself makes, image by image."""
    made = {value for before in segment for value in values_written(before)}
    return any(value in made for value in values_read(step))


def _last_uses(parts: Sequence[Part], graph: Graph) -> list[list[int]]:
    """Return after which part which tensors are not needed any more."""
    last: dict[int, int] = {}
    for number, part in enumerate(parts):
        for step in part.steps if isinstance(part, Segment) else (part,):
            for value in (*values_read(step), *values_written(step)):
                last[value] = number
    kept = {leaf.value for leaf in graph.outputs if isinstance(leaf, Ref)}
    dropped: list[list[int]] = [[] for _ in parts]
    for value, number in last.items():
        if value not in kept:
            dropped[number].append(value)
    return dropped
