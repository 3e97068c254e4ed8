"""From a graph and the form that each node works in, planes or tensors, to steps; conversions where forms meet."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sparsetwin.kernels import ConvolutionGeometry, Window, convolution_limits
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
    Pair,
    Torch,
)
from sparsetwin.runtime._sheets import Sheet, sheet_of
from sparsetwin.runtime._steps import Mean, Pack, Pool, Product, Step, TensorStep, Unpack, grouped

Form = Literal["planes", "tensor"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """Steps in order, and the sheets that they name."""

    steps: tuple[Step, ...]
    sheets: Mapping[int, Sheet]


def lower(graph: Graph, forms: Mapping[int, Form]) -> Lowered:
    """Return the steps of a graph whose nodes, by output, work in these forms."""
    lowering = _Lowering(graph)
    for node in graph.nodes:
        if forms[node.output] == "planes":
            lowering.on_planes(node)
        else:
            lowering.on_tensors(node)
    for value in sorted(graph.results()):
        lowering.tensor(value)
    return Lowered(steps=tuple(grouped(lowering.steps)), sheets=lowering.sheets)


def can_use_planes(graph: Graph, node: Node) -> bool:
    """Tell whether kernels can run a node on planes."""
    operation = node.operation
    if isinstance(operation, Torch) or any(sheet_of(graph.values[value]) is None for value in node.inputs):
        return False
    if not isinstance(operation, GlobalMean) and sheet_of(graph.values[node.output]) is None:
        return False
    match operation:
        case Convolution():
            if operation.stride[1] > 2 or operation.stride[0] > 2:
                return False
            sheet = sheet_of(graph.values[node.inputs[0]])
            assert sheet is not None
            return convolution_limits(geometry_of(operation, sheet)) is None
        case Linear():
            value = graph.values[node.inputs[0]]
            return value is not None and len(value.shape) in (2, 3)
        case MaxPool():
            fits = max(operation.padding[0], operation.padding[1]) < min(operation.kernel)
            return operation.stride[1] <= 2 and fits and is_not_negative(graph, node.inputs[0])
        case Affine():
            return True
    return True


def is_not_negative(graph: Graph, value: int) -> bool:
    """Tell whether a value has no element below zero, by what made it."""
    node = graph.producers().get(value)
    if node is None:
        return False
    if isinstance(node.operation, MaxPool):
        return is_not_negative(graph, node.inputs[0])
    operation = node.operation
    return isinstance(operation, Convolution | Linear | Affine | Add | Activate) and operation.activation == "relu"


def geometry_of(operation: Convolution, sheet: Sheet) -> ConvolutionGeometry:
    """Return the arithmetic of a convolution of images in a sheet."""
    return ConvolutionGeometry(
        in_channels=sheet.channels,
        out_channels=operation.weight.shape[0],
        kernel=(operation.weight.shape[2], operation.weight.shape[3]),
        height=sheet.height,
        width=sheet.width,
        stride=operation.stride,
        padding=operation.padding,
        dilation=operation.dilation,
        groups=operation.groups,
    )


@dataclass
class _Lowering:
    graph: Graph
    steps: list[Step] = field(default_factory=list)
    sheets: dict[int, Sheet] = field(default_factory=dict)
    planes_of: dict[int, int] = field(default_factory=dict)  # value -> sheet
    tensors: set[int] = field(default_factory=set)
    split: dict[tuple[int, Pair, bool], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors.update(value for value in self.graph.inputs if value is not None)

    def tensor(self, value: int) -> None:
        """See to it that a value is there as a tensor."""
        if value not in self.tensors:
            self.steps.append(Unpack(sheet=self.planes_of[value], value=value))
            self.tensors.add(value)

    def planes(self, value: int) -> int:
        """See to it that a value is there in planes, and return its sheet."""
        if value not in self.planes_of:
            self.planes_of[value] = self._value_sheet(value)
            self.steps.append(Pack(value=value, sheet=self.planes_of[value]))
        return self.planes_of[value]

    def on_tensors(self, node: Node) -> None:
        for value in node.inputs:
            self.tensor(value)
        self.steps.append(TensorStep(node=node))
        self.tensors.add(node.output)

    def on_planes(self, node: Node) -> None:
        inputs = [self.planes(value) for value in node.inputs]
        operation = node.operation
        if isinstance(operation, Linear):
            found = self.graph.values[node.inputs[0]]
            assert found is not None
            assert len(found.shape) in (2, 3), (
                "a linear layer on planes takes tokens: the channels of images lie elsewhere"
            )
        if isinstance(operation, GlobalMean):
            self.steps.append(Mean(node=node, source=inputs[0], value=node.output))
            self.tensors.add(node.output)
            return
        sheet = self.planes_of[node.output] = self._value_sheet(node.output)
        if isinstance(operation, MaxPool):
            window = Window(kernel=operation.kernel, stride=operation.stride, padding=operation.padding)
            self.steps.append(Pool(window=window, source=inputs[0], sheet=sheet))
            return
        source, geometry = inputs[0], self._geometry(node, inputs[0])
        if isinstance(operation, Convolution) and operation.stride != (1, 1):
            source, geometry = self._strided(source, geometry)
        residual = inputs[1] if len(inputs) > 1 else None
        self.steps.append(Product(node=node, geometry=geometry, source=source, sheet=sheet, residual=residual))

    def _geometry(self, node: Node, source: int) -> ConvolutionGeometry:
        sheet, operation = self.sheets[source], node.operation
        if isinstance(operation, Convolution):
            return geometry_of(operation, sheet)
        outputs = operation.weight.shape[0] if isinstance(operation, Linear) else sheet.channels
        return ConvolutionGeometry(
            in_channels=sheet.channels,
            out_channels=outputs,
            kernel=(1, 1),
            height=sheet.height,
            width=sheet.width,
            groups=1 if isinstance(operation, Linear) else sheet.channels,
        )

    def _strided(self, source: int, geometry: ConvolutionGeometry) -> tuple[int, ConvolutionGeometry]:
        """Return what a strided convolution reads: phases, or only the pixels that a 1x1 kernel touches."""
        sheet, stride = self.sheets[source], geometry.stride
        few = geometry.kernel == (1, 1) and geometry.padding == (0, 0)
        key = (source, stride, few)
        rows, columns = geometry.out_size
        if key not in self.split:
            number = self.split[key] = len(self.sheets)
            if few:
                self.sheets[number] = replace(sheet, height=rows, width=columns)
                self.steps.append(Pool(window=Window(stride=stride), source=source, sheet=number))
            else:
                self.sheets[number] = replace(sheet, phases=stride)
                for row in range(min(stride[0], sheet.height)):
                    for column in range(min(stride[1], sheet.width)):
                        at = (row, column)
                        window = Window(stride=stride)
                        self.steps.append(Pool(window=window, source=source, sheet=number, origin=at, phase=at))
        if few:
            geometry = replace(geometry, height=rows, width=columns, stride=(1, 1))
        return self.split[key], geometry

    def _value_sheet(self, value: int) -> int:
        sheet = sheet_of(self.graph.values[value])
        assert sheet is not None, "the form of a value that does not fit planes"
        number = len(self.sheets)
        self.sheets[number] = sheet
        return number
