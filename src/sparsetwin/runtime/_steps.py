"""What a program does, step by step, before memory is laid out: numbers name sheets (planes) and values (tensors)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sparsetwin.kernels import ConvolutionGeometry, PlaneLayout, PlaneWindow, Window
from sparsetwin.runtime._graph import Node, Pair


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorStep:
    """A node run on tensors."""

    node: Node


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """A tensor into planes."""

    value: int
    sheet: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Unpack:
    """Planes into a tensor."""

    sheet: int
    value: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """A convolution by a sparse kernel, planes to planes; all layers and all elementwise operations are one."""

    node: Node
    geometry: ConvolutionGeometry
    source: int
    sheet: int
    residual: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """A window's maximum, or the copy of one phase."""

    window: Window
    source: int
    sheet: int
    origin: Pair = (0, 0)
    phase: Pair = (0, 0)

    def kernel(self, layouts: Mapping[int, PlaneLayout]) -> PlaneWindow:
        """Return the kernel between the layouts of the two sheets."""
        source, destination = layouts[self.source], layouts[self.sheet]
        return PlaneWindow(self.window, source=source, destination=destination, origin=self.origin, phase=self.phase)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mean:
    """Each plane's mean, planes to a tensor."""

    node: Node
    source: int
    value: int


PlaneStep = Pack | Unpack | Product | Pool | Mean
Step = TensorStep | PlaneStep


def sheets_read(step: Step) -> tuple[int, ...]:
    """Return the sheets that a step reads."""
    match step:
        case Unpack():
            return (step.sheet,)
        case Product():
            return (step.source,) if step.residual is None else (step.source, step.residual)
        case Pool() | Mean():
            return (step.source,)
    return ()


def sheets_written(step: Step) -> tuple[int, ...]:
    """Return the sheets that a step writes."""
    return (step.sheet,) if isinstance(step, Pack | Product | Pool) else ()


def values_read(step: Step) -> tuple[int, ...]:
    """Return the tensors that a step reads."""
    if isinstance(step, TensorStep):
        return step.node.inputs
    return (step.value,) if isinstance(step, Pack) else ()


def values_written(step: Step) -> tuple[int, ...]:
    """Return the tensors that a step makes."""
    if isinstance(step, TensorStep):
        return (step.node.output,)
    return (step.value,) if isinstance(step, Unpack | Mean) else ()


def grouped(steps: Iterable[Step]) -> list[Step]:
    """Return the steps in an order that keeps steps on planes together: each as soon as it can, planes first."""
    waiting = list(steps)
    made = {("sheet", sheet) for step in waiting for sheet in sheets_written(step)}
    made |= {("value", value) for step in waiting for value in values_written(step)}
    missing: dict[tuple[str, int], int] = {}
    for step in waiting:  # a sheet of several phases is there when each of them is
        for name in _written(step):
            missing[name] = missing.get(name, 0) + 1
    order: list[Step] = []
    on_planes = False
    while waiting:
        ready = [step for step in waiting if all(missing.get(name, 0) == 0 for name in _read(step))]
        same = [step for step in ready if isinstance(step, TensorStep) != on_planes]
        chosen = (same or ready)[0]
        on_planes = not isinstance(chosen, TensorStep)
        waiting.remove(chosen)
        order.append(chosen)
        for name in _written(chosen):
            missing[name] -= 1
    return order


def _read(step: Step) -> list[tuple[str, int]]:
    return [("sheet", sheet) for sheet in sheets_read(step)] + [("value", value) for value in values_read(step)]


def _written(step: Step) -> list[tuple[str, int]]:
    return [("sheet", sheet) for sheet in sheets_written(step)] + [("value", value) for value in values_written(step)]
