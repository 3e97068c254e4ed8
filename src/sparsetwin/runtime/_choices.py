"""Which engine runs each node: measured one by one, conversions too, and chosen together by a minimum cut."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparsetwin.kernels import (
    DenseConvolution,
    PlaneLayout,
    Pool,
    SparseConvolution,
    Tiling,
    make_layout,
)
from sparsetwin.runtime._cut import Cut, converted_once
from sparsetwin.runtime._dense import TensorEngine, tensor_function, worth_trying
from sparsetwin.runtime._graph import Convolution, GlobalMean, Graph, Layer, Linear, Node, Torch
from sparsetwin.runtime._lowering import Form, Lowered, can_use_planes, lower
from sparsetwin.runtime._products import DEFAULT, Packed, activation_of, density_of, is_narrow
from sparsetwin.runtime._program import Program
from sparsetwin.runtime._reduced import DensePlanes, other_panels
from sparsetwin.runtime._sheets import Sheet, pack_image, pixels, sheet_of, unpack_image
from sparsetwin.runtime._steps import Product
from sparsetwin.runtime._timing import shortest
from sparsetwin.runtime._trial import Trial

Engine = Literal["planes", "dense planes", "rows", "dense"]
Prefer = Literal["time", "memory"]
_ON_PLANES: tuple[Engine, ...] = ("planes", "dense planes")
_NEVER = 1e6  # seconds
_TUNED = 1e-4  # seconds that a layer takes at least to be worth other tilings


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What runs a node, and the seconds that were measured for each engine."""

    engine: Engine
    tiling: Tiling = DEFAULT  # on planes
    rows: Tiling = DEFAULT  # on rows of tokens
    panels: Tiling = DEFAULT  # dense on planes
    dot: str | None = None  # the instruction that dense planes were measured with
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def form(self) -> Form:
        """Whether it works on planes or on tensors."""
        return "planes" if self.engine in _ON_PLANES else "tensor"

    @property
    def fastest_on_planes(self) -> Engine | None:
        """The faster engine on planes, of those that were measured."""
        return min((name for name in _ON_PLANES if name in self.seconds), key=self.seconds.__getitem__, default=None)


Choices = Mapping[int, Choice]


def make_program(graph: Graph, choices: Choices, *, packed: Packed, threads: int) -> Program:
    """Return the program in which each node, by output, runs as chosen."""
    pool = Pool(threads) if threads > 1 else None

    def function(node: Node) -> Any:
        choice = choices[node.output]
        assert choice.engine in ("rows", "dense")
        value = graph.values[node.inputs[0]] if node.inputs else None
        return tensor_function(node, value, choice.engine, tiling=choice.rows, pool=pool)

    def product(step: Product, source: PlaneLayout, destination: PlaneLayout) -> SparseConvolution | DenseConvolution:
        choice = choices[step.node.output]
        if choice.engine != "dense planes":
            return packed.for_step(step, source, destination, choice.tiling)
        return packed.dense_convolution(
            step.node, step.geometry, tiling=choice.panels, source=source, destination=destination
        )

    return Program(
        graph,
        forms={output: choice.form for output, choice in choices.items()},
        product=product,
        function=function,
        threads=threads,
        half=packed.half,
    )


def all_dense(choices: Choices) -> Choices:
    """Return choices with PyTorch's dense operation for every node."""
    return {output: replace(choice, engine="dense") for output, choice in choices.items()}


@torch.no_grad()
def measured_choices(
    graph: Graph, *, packed: Packed, threads: int, prefer: Prefer = "time", bfloat16: DensePlanes | None = None
) -> tuple[Choices, Choices]:
    """Return the fastest choice for every node, conversions between planes and tensors counted.

    Args:
        graph: The network, fused.
        packed: Takes the matrices of the best tilings.
        threads: Of the kernels.
        prefer: Whether narrow values run where they are faster, or wherever a sparse kernel runs.
        bfloat16: Permission for dense kernels on planes.

    Returns:
        Choices without dense kernels on planes, and with them: the same where there is no permission.
    """
    measure = _Measure(graph, packed, threads, prefer, bfloat16)
    found = {node.output: measure.node(node) for node in graph.nodes if not isinstance(node.operation, Torch)}
    found |= {node.output: Choice(engine="dense") for node in graph.nodes if isinstance(node.operation, Torch)}
    return _chosen(graph, found, measure)


def _chosen(graph: Graph, found: Mapping[int, Choice], measure: "_Measure") -> tuple[Choices, Choices]:
    """Return the cheapest choices without dense kernels on planes, and with them if they were measured."""
    if measure.bfloat16 is None:
        chosen = _cheapest(graph, found, measure)
        return chosen, chosen
    float32 = _cheapest(graph, {output: _without_dense_planes(one) for output, one in found.items()}, measure)
    both = {output: replace(found[output], engine=one.engine) for output, one in float32.items()}
    return both, _cheapest(graph, found, measure)


def without_dense_planes(choices: Choices) -> Choices:
    """Return choices with the next fastest engine where the dense kernel on planes was chosen."""

    def next_best(choice: Choice) -> Choice:
        if choice.engine != "dense planes":
            return choice
        rest: tuple[Engine, ...] = ("planes", "rows", "dense")
        return replace(choice, engine=min(rest, key=lambda name: choice.seconds.get(name, _NEVER)))

    return {output: next_best(choice) for output, choice in choices.items()}


@torch.no_grad()
def half_choices(
    graph: Graph, choices: Choices, *, packed: Packed, threads: int, bfloat16: DensePlanes | None = None
) -> tuple[Choices, Choices]:
    """Return the fastest choice for every node where planes are float16.

    Args:
        graph: The network, fused.
        choices: Measured in float32; what they say about tensors is taken over.
        packed: Says how to compute in float16; takes the matrices of the best tilings.
        threads: Of the kernels.
        bfloat16: As for `measured_choices`.

    Returns:
        As `measured_choices`.
    """
    measure = _Measure(graph, packed, threads, "time", bfloat16)
    found = {node.output: measure.half_node(node, choices[node.output]) for node in graph.nodes}
    return _chosen(graph, found, measure)


def _without_dense_planes(choice: Choice) -> Choice:
    seconds = {name: found for name, found in choice.seconds.items() if name != "dense planes"}
    return replace(choice, seconds=seconds)


def all_planes(graph: Graph, choices: Choices) -> Choices:
    """Return choices with every node on planes that can be and that was measured there; others keep theirs.

    The seconds may be those of another shape, whose values fitted planes where this one's do not.
    """

    def engine(node: Node) -> Engine:
        choice = choices[node.output]
        return (can_use_planes(graph, node) and choice.fastest_on_planes) or choice.engine

    return {node.output: replace(choices[node.output], engine=engine(node)) for node in graph.nodes}


class _Measure:
    """Times nodes on random activations; equal work is timed once."""

    def __init__(
        self, graph: Graph, packed: Packed, threads: int, prefer: Prefer, bfloat16: DensePlanes | None
    ) -> None:
        self.graph, self.packed, self.threads, self.prefer = graph, packed, threads, prefer
        self.bfloat16 = bfloat16
        self.pool = Pool(threads) if threads > 1 else None
        self.generator = torch.Generator().manual_seed(0)
        self.known: dict[Any, float] = {}
        self.dense_planes: dict[Any, dict[Tiling, float]] = {}

    def node(self, node: Node) -> Choice:
        """Return the measured seconds of a node, its best tiling, and the faster engine on tensors."""
        seconds = {"dense": self._dense(node)}
        tiling = rows = panels = DEFAULT
        layer = isinstance(node.operation, Layer)
        sparse = not layer or worth_trying(node, density_of(node))
        if sparse and can_use_planes(self.graph, node):
            tried = self._planes(node)
            tiling = self._note("planes", tried, seconds)
            self.packed.drop_others(node, tiling)
        if sparse and isinstance(node.operation, Linear):
            wanted = self._storages(node, DEFAULT)
            rows = self._note("rows", {one: self._timed_tensor(node, "rows", one) for one in wanted}, seconds)
        if self.bfloat16 is not None and layer and can_use_planes(self.graph, node):
            tried = self._dense_planes(node, self.bfloat16)
            self.packed.tiles.pop(node.output, None)  # made anew for the layers that are chosen
            panels = self._note("dense planes", tried, seconds) if tried else panels
        faster: Engine = "rows" if seconds.get("rows", _NEVER) < seconds["dense"] else "dense"
        dot = None if self.bfloat16 is None else self.bfloat16.dot.name
        return Choice(engine=faster, tiling=tiling, rows=rows, panels=panels, dot=dot, seconds=seconds)

    def half_node(self, node: Node, known: Choice) -> Choice:
        """Return what `node` does for float16 planes; other engines take the seconds that are known."""
        seconds = {name: known.seconds[name] for name in ("rows", "dense") if name in known.seconds}
        tiling = panels = DEFAULT
        if "planes" in known.seconds:
            tiling = self._note("planes", self._planes(node), seconds)
            self.packed.drop_others(node, tiling)
        if self.bfloat16 is not None and "dense planes" in known.seconds:
            tried = self._dense_planes(node, self.bfloat16)
            self.packed.tiles.pop(node.output, None)
            panels = self._note("dense planes", tried, seconds) if tried else panels
        faster: Engine = "rows" if seconds.get("rows", _NEVER) < seconds.get("dense", _NEVER) else "dense"
        return replace(known, engine=faster, tiling=tiling, panels=panels, seconds=seconds)

    def _storages(self, node: Node, tiling: Tiling) -> list[Tiling]:
        """Return a tiling with each way to store values that takes part."""
        if not is_narrow(node) or self.packed.half is not None:
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
            layout = _some_layout(sheet, self.packed.dtype)
            planes, tensor = layout.empty(1), torch.zeros(found.shape, dtype=torch.float32, device="cpu")
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
        tensor = torch.rand(found.shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return tensor.contiguous(memory_format=torch.channels_last) if blocked else tensor

    def _share(self, images: int) -> float:
        """Return how many times the time of one image on one thread passes for all images."""
        return -(-images // self.threads) if images >= self.threads else images

    def _planes(self, node: Node) -> dict[Tiling, float]:
        """Return the seconds of a node on planes, the splitting of its input included, with each tiling tried."""
        lowered = self._alone(node)
        images = lowered.sheets[0].images
        bench = Trial(lowered, self.packed, self.pool if images < self.threads else None, self.generator)
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

    def _dense_planes(self, node: Node, bfloat16: DensePlanes) -> dict[Tiling, float]:
        """Return the seconds of a layer dense on planes, with each tiling tried; none if its results are wrong."""
        lowered = self._alone(node)
        (step,) = [step for step in lowered.steps if isinstance(step, Product)]
        if not bfloat16.suits(step.geometry):
            return {}
        key = ("dense planes", step.geometry, *lowered.sheets.values(), activation_of(node), len(node.inputs))
        if key not in self.dense_planes:
            images = lowered.sheets[0].images
            bench = Trial(lowered, self.packed, self.pool if images < self.threads else None, self.generator)
            seconds = {DEFAULT: bench.seconds(DEFAULT, dense=True)}
            if seconds[DEFAULT] > _TUNED:
                seconds |= {tiling: bench.seconds(tiling, dense=True) for tiling in other_panels(step.geometry)}
            self.dense_planes[key] = {tiling: self._share(images) * found for tiling, found in seconds.items()}
        found = self.dense_planes[key]
        best = min(found, key=found.__getitem__)
        plain = self.packed.unscaled()
        return found if bfloat16.is_right(node, step.geometry, plain, tiling=best, pool=self.pool) else {}

    def _alone(self, node: Node) -> Lowered:
        single = Graph(nodes=(node,), values=self.graph.values, inputs=node.inputs, outputs=(), out_spec=None)
        return lower(single, {node.output: "planes"})


def _some_layout(sheet: Sheet, dtype: torch.dtype) -> PlaneLayout:
    """Return a layout like those that convolutions of such images have."""
    pitch, lead = sheet.width + 1, sheet.width + 2
    return make_layout(
        channels=sheet.channels, height=sheet.height, width=sheet.width, pitch=pitch, lead=lead, dtype=dtype
    )


def _cheapest(graph: Graph, found: Mapping[int, Choice], measure: _Measure) -> Choices:
    """Choose the form of all nodes at once; a value is converted once, for all that read it in the other form."""
    if not any(choice.fastest_on_planes for choice in found.values()):
        return found
    cut = Cut()
    nodes: dict[int, int] = {}
    values: dict[int, int] = {value: cut.point(first=_NEVER) for value in graph.inputs if value is not None}
    for node in graph.nodes:
        seconds, faster = found[node.output].seconds, found[node.output].fastest_on_planes
        on_tensors = min((seconds[name] for name in ("rows", "dense") if name in seconds), default=0.0)
        nodes[node.output] = cut.point(first=_NEVER if faster is None else seconds[faster], second=on_tensors)
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
        output: replace(choice, engine=choice.fastest_on_planes or "planes") if nodes[output] in first else choice
        for output, choice in found.items()
    }
