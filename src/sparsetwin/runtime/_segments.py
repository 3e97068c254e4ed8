"""Steps on planes bound to memory: functions of the tensors of a call and the number of an image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsetwin.kernels import (
    Chain,
    DenseConvolution,
    KernelPiece,
    Panels,
    PlaneLayout,
    PlaneWindow,
    Pool,
    SparseConvolution,
)
from sparsetwin.runtime._serial import serial
from sparsetwin.runtime._sheets import Sheet, pack_image, pixels, unpack_image
from sparsetwin.runtime._steps import Mean, Pack, Product, Step, Unpack, sheets_read, sheets_written
from sparsetwin.runtime._steps import Pool as PoolStep

Bound = Callable[[dict[int, Any], int], None]
Planes = Callable[[int], Tensor]
PlaneKernel = SparseConvolution | DenseConvolution | PlaneWindow


def bind_all(
    steps: Sequence[Step],
    *,
    sheets: Mapping[int, Sheet],
    layouts: Mapping[int, PlaneLayout],
    planes: Planes,
    kernels: Mapping[Step, PlaneKernel],
    panels: Panels,
    threads: int,
    pool: Pool | None,
) -> list[Bound]:
    """Return what runs steps on one image, one after the other; kernels without others between them are one chain.

    Args:
        steps: On planes, in order.
        sheets: What each sheet holds.
        layouts: How it lies.
        planes: Returns a sheet's memory, (1, elements), which stays where it is.
        kernels: Those of the steps that have one.
        panels: For dense kernels among them, as large as `panel_bytes` says. They must outlive what is returned, and
            serve one call at a time.
        threads: That run kernels at once, on this image or others.
        pool: Threads that share the kernels' work; the caller's alone if None.
    """
    found: list[Bound] = []
    waiting: list[Step] = []

    def flush() -> None:
        if waiting:
            found.append(_run([(step, kernels[step]) for step in waiting], planes, panels, pool))
            waiting.clear()

    for step in steps:
        if step in kernels:
            waiting.append(step)
            continue
        flush()
        run = _bind(step, sheets=sheets, layouts=layouts, planes=planes)
        found.append(serial(run) if threads > 1 else run)
    flush()
    return found


def _bind(step: Step, *, sheets: Mapping[int, Sheet], layouts: Mapping[int, PlaneLayout], planes: Planes) -> Bound:
    """Return what runs a step that has no kernel."""
    match step:
        case Pack():
            return _pack(step.value, sheets[step.sheet], pixels(layouts[step.sheet], planes(step.sheet)))
        case Unpack():
            return _unpack(step.value, sheets[step.sheet], pixels(layouts[step.sheet], planes(step.sheet)))
        case Mean():
            return _mean(step.value, sheets[step.source], layouts[step.source], planes(step.source))
    raise AssertionError(f"{step} has no kernel and does not work on planes")


def panel_bytes(kernels: Iterable[PlaneKernel]) -> int:
    """Return the size of panels that suits all dense kernels."""
    return max((kernel.panel_bytes for kernel in kernels if isinstance(kernel, DenseConvolution)), default=0)


def kernel_pieces(
    step: Step, kernel: PlaneKernel, planes: Planes, pool: Pool | None, panels: tuple[Panels, int]
) -> list[KernelPiece]:
    """Return the work of a step's kernel on one image; ``panels`` are those of dense kernels, and the first to use."""
    threads = pool.threads if pool else 1
    if isinstance(kernel, PlaneWindow):
        assert isinstance(step, PoolStep)
        return kernel.bound(planes(step.source), out=planes(step.sheet), threads=threads)
    assert isinstance(step, Product)
    residual = None if step.residual is None else planes(step.residual)
    source, out = planes(step.source), planes(step.sheet)
    if isinstance(kernel, DenseConvolution):
        memory, first = panels
        return kernel.bound(source, residual=residual, out=out, panels=memory, first_part=first, threads=threads)
    return kernel.bound(source, residual=residual, out=out, threads=threads)


def _run(work: Sequence[tuple[Step, PlaneKernel]], planes: Planes, panels: Panels, pool: Pool | None) -> Bound:
    ranks = _ranks([step for step, _ in work], planes) if pool is not None else list(range(len(work)))
    kernels: list[list[KernelPiece]] = [[] for _ in range(max(ranks) + 1)]
    parts = [0] * len(kernels)  # of the panels: kernels of one rank may run at once, others not
    for rank, (step, kernel) in zip(ranks, work, strict=True):
        pieces = kernel_pieces(step, kernel, planes, pool, (panels, parts[rank]))
        parts[rank] += len(pieces) if isinstance(kernel, DenseConvolution) else 0
        kernels[rank] += pieces
    chain = Chain(kernels)

    def run(values: dict[int, Any], image: int) -> None:
        chain.run(pool)

    return run


def _ranks(steps: Sequence[Step], planes: Planes) -> list[int]:
    """Return for each step how many others must come before it; steps of one rank do not touch each other's memory."""
    read: dict[int, int] = {}  # memory -> the first rank that may write it
    written: dict[int, int] = {}  # memory -> the first rank that may read it
    phases: dict[int, tuple[int, int]] = {}  # memory -> the sheet whose phases are being written, and the least rank
    ranks = []
    for step in steps:
        sources = [planes(sheet).data_ptr() for sheet in sheets_read(step)]
        (sheet,) = sheets_written(step)
        out = planes(sheet).data_ptr()
        free = max(read.get(out, 0), written.get(out, 0))
        if isinstance(step, PoolStep):  # kernels that write phases of one sheet do not disturb each other
            if phases.get(out, (-1, 0))[0] != sheet:
                phases[out] = (sheet, free)
            free = phases[out][1]
        else:
            phases.pop(out, None)
        rank = max([free, *(written.get(source, 0) for source in sources)])
        ranks.append(rank)
        written[out] = max(written.get(out, 0), rank + 1)
        for source in sources:
            read[source] = max(read.get(source, 0), rank + 1)
    return ranks


def _pack(value: int, sheet: Sheet, view: Tensor) -> Bound:
    def run(values: dict[int, Any], image: int) -> None:
        pack_image(sheet, values[value], image, view)

    return run


def _unpack(value: int, sheet: Sheet, view: Tensor) -> Bound:
    def run(values: dict[int, Any], image: int) -> None:
        unpack_image(sheet, view, values[value], image)

    return run


def _mean(value: int, sheet: Sheet, layout: PlaneLayout, planes: Tensor) -> Bound:
    """Sum whole planes: what lies between the pixels is zero."""
    rows = planes.view(-1)[: layout.channels * layout.plane].view(layout.channels, layout.plane)
    rows = rows[:, layout.lead : layout.lead + layout.height * layout.pitch]
    count = sheet.height * sheet.width * sheet.factor

    def run(values: dict[int, Any], image: int) -> None:
        out = values[value].view(sheet.images, sheet.channels)[image]
        torch.sum(rows, 1, dtype=out.dtype, out=out)
        out.div_(count)

    return run
