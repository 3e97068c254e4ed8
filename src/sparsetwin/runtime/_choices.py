"""Which engine runs each node: measured one by one, conversions too, and chosen together by a minimum cut."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparsetwin.kernels import (
    PlaneLayout,
    PlaneWindow,
    Pool,
    SparseConvolution,
    Tiling,
    host_target,
    make_layout,
    max_vectors,
)
from sparsetwin.runtime._cut import Cut, converted_once
from sparsetwin.runtime._dense import TensorEngine, tensor_function, worth_trying
from sparsetwin.runtime._graph import Convolution, GlobalMean, Graph, Layer, Linear, Node, Torch
from sparsetwin.runtime._layouts import lay_out
from sparsetwin.runtime._lowering import Form, Lowered, can_use_planes, lower
from sparsetwin.runtime._products import DEFAULT, Packed, activation_of, density_of, is_narrow
from sparsetwin.runtime._program import Program
from sparsetwin.runtime._segments import bind_all
from sparsetwin.runtime._sheets import Sheet, pack_image, pixels, sheet_of, unpack_image
from sparsetwin.runtime._steps import Mean, Pack, Product, Step
from sparsetwin.runtime._steps import Pool as PoolStep
from sparsetwin.runtime._timing import shortest

Engine = Literal["planes", "rows", "dense"]
Prefer = Literal["time", "memory"]
_NEVER = 1e6  # seconds
_REPEATED = 6  # times that several threads run a node in one chain, to which they come late
_TUNED = 1e-4  # seconds that a layer takes at least to be worth other tilings


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs a node, and the seconds that were measured for each engine."""

    engine: Engine
    tiling: Tiling = DEFAULT  # on planes
    rows: Tiling = DEFAULT  # on rows of tokens
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """Whether it works on planes or on tensors."""
        return "planes" if self.engine == "planes" else "tensor"


Choices = Mapping[int, Choice]


def make_program(graph: Graph, choices: Choices, *, packed: Packed, threads: int) -> Program:
    """Return the program in which each node, by output, runs as chosen."""
    pool = Pool(threads) if threads > 1 else None

    def function(node: Node) -> Any:
        choice = choices[node.output]
        assert choice.engine != "planes"
        value = graph.values[node.inputs[0]] if node.inputs else None
        return tensor_function(node, value, choice.engine, tiling=choice.rows, pool=pool)

    return Program(
        graph,
        forms={output: choice.form for output, choice in choices.items()},
        product=lambda step, source, destination: packed.for_step(
            step, source, destination, choices[step.node.output].tiling
        ),
        function=function,
        threads=threads,
    )


def all_dense(choices: Choices) -> Choices:
    """Return choices with PyTorch's dense operation for every node."""
    return {output: replace(choice, engine="dense") for output, choice in choices.items()}


@torch.no_grad()
def measured_choices(graph: Graph, *, packed: Packed, threads: int, prefer: Prefer = "time") -> Choices:
    """Return the fastest choice for every node, conversions between planes and tensors counted.

    Args:
        graph: The network, fused.
        packed: Takes the matrices of the best tilings.
        threads: Of the kernels.
        prefer: Whether narrow values run where they are faster, or wherever a sparse kernel runs.
    """
    measure = _Measure(graph, packed, threads, prefer)
    found = {node.output: measure.node(node) for node in graph.nodes if not isinstance(node.operation, Torch)}
    found |= {node.output: Choice(engine="dense") for node in graph.nodes if isinstance(node.operation, Torch)}
    return _cheapest(graph, found, measure)


def all_planes(graph: Graph, choices: Choices) -> Choices:
    """Return choices with every node on planes that can be and that was measured there."""
    return {
        node.output: replace(choices[node.output], engine="planes")
        if "planes" in choices[node.output].seconds
        else choices[node.output]
        for node in graph.nodes
    }


class _Measure:
    """Times nodes on random activations; equal work is timed once."""

    def __init__(self, graph: Graph, packed: Packed, threads: int, prefer: Prefer) -> None:
        self.graph, self.packed, self.threads, self.prefer = graph, packed, threads, prefer
        self.pool = Pool(threads) if threads > 1 else None
        self.generator = torch.Generator().manual_seed(0)
        self.known: dict[Any, float] = {}

    def node(self, node: Node) -> Choice:
        """Return the measured seconds of a node, its best tiling, and the faster engine on tensors."""
        seconds = {"dense": self._dense(node)}
        tiling = rows = DEFAULT
        layer = isinstance(node.operation, Layer)
        sparse = not layer or worth_trying(node, density_of(node))
        if sparse and can_use_planes(self.graph, node):
            tried = self._planes(node)
            tiling = self._note("planes", tried, seconds)
            self.packed.drop_others(node, tiling)
        if sparse and isinstance(node.operation, Linear):
            wanted = self._storages(node, DEFAULT)
            rows = self._note("rows", {one: self._timed_tensor(node, "rows", one) for one in wanted}, seconds)
        faster: Engine = "rows" if seconds.get("rows", _NEVER) < seconds["dense"] else "dense"
        return Choice(engine=faster, tiling=tiling, rows=rows, seconds=seconds)

    def _storages(self, node: Node, tiling: Tiling) -> list[Tiling]:
        """Return a tiling with each way to store values that takes part."""
        if not is_narrow(node):
            return [tiling]
        narrow = replace(tiling, narrow=True)
        return [narrow] if self.prefer == "memory" else [tiling, narrow]

    def _note(self, engine: str, tried: Mapping[Tiling, float], seconds: dict[str, float]) -> Tiling:
        """Enter the seconds of an engine, those with narrow values by themselves too; return the best tiling."""
        best = min(tried, key=tried.__getitem__)
        seconds[engine] = tried[best]
        narrow = [found for tiling, found in tried.items() if tiling.narrow]
        if narrow:
            seconds[f"{engine}, narrow values"] = min(narrow)
        return best

    def conversion(self, value: int) -> tuple[float, float]:
        """Return the seconds from planes to a tensor and back."""
        sheet, found = sheet_of(self.graph.values[value]), self.graph.values[value]
        if sheet is None or found is None:
            return _NEVER, _NEVER
        if ("conversion", sheet) not in self.known:
            layout = _some_layout(sheet)
            planes, tensor = layout.empty(1), torch.zeros(found.shape)
            view, share = pixels(layout, planes), self._share(sheet.images)
            here = shortest(lambda: unpack_image(sheet, view, tensor, 0), threads=1)
            back = shortest(lambda: pack_image(sheet, tensor, 0, view), threads=1)
            self.known["conversion", sheet], self.known["conversion back", sheet] = share * here, share * back
        return self.known["conversion", sheet], self.known["conversion back", sheet]

    def _dense(self, node: Node) -> float:
        operation = node.operation
        shapes = tuple(self.graph.values[value] for value in (*node.inputs, node.output))
        key: tuple[Any, ...] = (type(operation), shapes, getattr(operation, "activation", None))
        if isinstance(operation, Convolution):
            key += (operation.weight.shape, operation.stride, operation.padding, operation.dilation, operation.groups)
        elif isinstance(operation, Linear):
            key += (operation.weight.shape,)
        if key not in self.known:
            self.known[key] = self._timed_tensor(node, "dense")
        return self.known[key]

    def _timed_tensor(self, node: Node, engine: TensorEngine, tiling: Tiling = DEFAULT) -> float:
        value = self.graph.values[node.inputs[0]]
        inputs = [self._tensor(read, blocked=isinstance(node.operation, Convolution)) for read in node.inputs]
        run = tensor_function(node, value, engine, tiling=tiling, pool=self.pool)
        return shortest(lambda: run(*inputs), threads=self.threads)

    def _tensor(self, value: int, *, blocked: bool) -> Tensor:
        found = self.graph.values[value]
        assert found is not None
        tensor = torch.rand(found.shape, generator=self.generator)
        return tensor.contiguous(memory_format=torch.channels_last) if blocked else tensor

    def _share(self, images: int) -> float:
        """Return how many times the time of one image on one thread passes for all images."""
        return -(-images // self.threads) if images >= self.threads else images

    def _planes(self, node: Node) -> dict[Tiling, float]:
        """Return the seconds of a node on planes, the splitting of its input included, with each tiling tried."""
        single = Graph(nodes=(node,), values=self.graph.values, inputs=node.inputs, outputs=(), out_spec=None)
        lowered = lower(single, {node.output: "planes"})
        images = lowered.sheets[0].images
        bench = _Bench(lowered, self.packed, self.pool if images < self.threads else None, self.generator)
        share = self._share(images)
        if not isinstance(node.operation, Layer):
            key = ("planes", type(node.operation), *lowered.sheets.values(), activation_of(node))
            if key not in self.known:
                self.known[key] = share * bench.seconds(DEFAULT)
            return {DEFAULT: self.known[key]}
        first = self._storages(node, DEFAULT)
        seconds = {tiling: bench.seconds(tiling) for tiling in first}
        if seconds[first[0]] > _TUNED:
            for tiling in bench.other_tilings():
                tiling = replace(tiling, narrow=first[0].narrow)
                seconds[tiling] = bench.seconds(tiling)
            best = min(seconds, key=seconds.__getitem__)
            if len(first) > 1 and not best.narrow and best not in first:
                seconds[replace(best, narrow=True)] = bench.seconds(replace(best, narrow=True))
        return {tiling: share * found for tiling, found in seconds.items()}


class _Bench:
    """One node's steps on planes of one image."""

    def __init__(self, lowered: Lowered, packed: Packed, pool: Pool | None, generator: torch.Generator) -> None:
        self.lowered, self.packed, self.pool = lowered, packed, pool
        self.layouts = lay_out(lowered)
        self.planes = {sheet: layout.empty(1) for sheet, layout in self.layouts.items()}
        self.values: dict[int, Tensor] = {}
        self.kernels: dict[Step, SparseConvolution | PlaneWindow] = {}
        for step in lowered.steps:
            if isinstance(step, Pack):
                layout = self.layouts[step.sheet]
                images = torch.rand(1, layout.channels, layout.height, layout.width, generator=generator)
                layout.pack(images, out=self.planes[step.sheet])
            elif isinstance(step, Mean):
                sheet = lowered.sheets[step.source]
                self.values[step.value] = torch.empty(sheet.images, sheet.channels)
            elif isinstance(step, PoolStep):
                self.kernels[step] = step.kernel(self.layouts)

    def seconds(self, tiling: Tiling) -> float:
        """Return the seconds of one image."""
        steps = [step for step in self.lowered.steps if not isinstance(step, Pack)]
        for step in steps:
            if isinstance(step, Product):
                layouts = self.layouts[step.source], self.layouts[step.sheet]
                self.kernels[step] = self.packed.for_step(step, *layouts, tiling)
        times = _REPEATED if self.pool else 1
        bound = bind_all(
            steps * times,
            sheets=self.lowered.sheets,
            layouts=self.layouts,
            planes=self.planes.__getitem__,
            kernels=self.kernels,
            threads=self.pool.threads if self.pool else 1,
            pool=self.pool,
        )

        def run() -> None:
            for one in bound:
                one(self.values, 0)

        return shortest(run, threads=self.pool.threads if self.pool else 1) / times

    def other_tilings(self) -> list[Tiling]:
        """Return what to try beside the default: other widths of a tile, other blocks of channels."""
        (step,) = [step for step in self.lowered.steps if isinstance(step, Product)]
        kernel = self.kernels[step]
        assert isinstance(kernel, SparseConvolution)
        geometry = step.geometry
        per_group = geometry.in_channels // geometry.groups
        block = kernel.matrix.block_columns // (geometry.kernel[0] * geometry.kernel[1])
        blocks = {block // 2, 2 * block, per_group} - {block, 0} if geometry.groups == 1 else set()
        found = [Tiling(block=min(other, per_group)) for other in sorted(blocks)]
        columns = kernel.destination.pitch * geometry.out_size[0]
        lanes = host_target().lanes
        for vectors in (6, 10):
            if vectors * lanes < columns + lanes and vectors <= max_vectors(host_target()):
                found.append(Tiling(vectors=vectors, block=block if geometry.groups == 1 else None))
        return found


def _some_layout(sheet: Sheet) -> PlaneLayout:
    """Return a layout like those that convolutions of such images have."""
    return make_layout(
        channels=sheet.channels, height=sheet.height, width=sheet.width, pitch=sheet.width + 1, lead=sheet.width + 2
    )


def _cheapest(graph: Graph, found: Mapping[int, Choice], measure: _Measure) -> Choices:
    """Choose the form of all nodes at once; a value is converted once, for all that read it in the other form."""
    if not any("planes" in choice.seconds for choice in found.values()):
        return found
    cut = Cut()
    nodes: dict[int, int] = {}
    values: dict[int, int] = {value: cut.point(first=_NEVER) for value in graph.inputs if value is not None}
    for node in graph.nodes:
        seconds = found[node.output].seconds
        on_tensors = min((seconds[name] for name in ("rows", "dense") if name in seconds), default=0.0)
        nodes[node.output] = cut.point(first=seconds.get("planes", _NEVER), second=on_tensors)
        if isinstance(node.operation, GlobalMean | Torch):
            values[node.output] = cut.point(first=_NEVER)  # its result is a tensor whatever it reads
        else:
            values[node.output] = nodes[node.output]
    result = cut.point(first=_NEVER)
    users, results = graph.users(), graph.results()
    for value, point in values.items():
        readers = [nodes[node.output] for node in users[value]] + ([result] if value in results else [])
        here, back = measure.conversion(value) if readers else (0.0, 0.0)
        converted_once(cut, point, readers, to_second=here, to_first=back)
    first = cut.first_side()
    return {
        output: replace(choice, engine="planes") if nodes[output] in first else choice
        for output, choice in found.items()
    }
