"""Steps on planes bound to memory: functions of the tensors of a call and the number of an image."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsetwin.kernels import PlaneLayout, PlaneWindow, Pool, SparseConvolution
from sparsetwin.runtime._sheets import Sheet, pack_image, pixels, unpack_image
from sparsetwin.runtime._steps import Mean, Pack, Product, Step, Unpack
from sparsetwin.runtime._steps import Pool as PoolStep

Bound = Callable[[dict[int, Any], int], None]
_Piece = Callable[[], None]


def bind(
    step: Step,
    *,
    sheets: Mapping[int, Sheet],
    layouts: Mapping[int, PlaneLayout],
    planes: Callable[[int], Tensor],
    kernel: SparseConvolution | PlaneWindow | None,
    pool: Pool | None,
) -> Bound:
    """Return what runs a step on one image.

    Args:
        step: A step on planes.
        sheets: What each sheet holds.
        layouts: How it lies.
        planes: Returns a sheet's memory, (1, elements), which stays where it is.
        kernel: The step's, where it has one.
        pool: Threads that share the step; the caller's alone if None.
    """
    threads = pool.threads if pool else 1
    match step:
        case Product():
            assert isinstance(kernel, SparseConvolution)
            residual = None if step.residual is None else planes(step.residual)
            pieces = kernel.bound(planes(step.source), residual=residual, out=planes(step.sheet), threads=threads)
            return _run(pieces, pool)
        case PoolStep():
            assert isinstance(kernel, PlaneWindow)
            return _run(kernel.bound(planes(step.source), out=planes(step.sheet), threads=threads), pool)
        case Pack():
            return _pack(step.value, sheets[step.sheet], pixels(layouts[step.sheet], planes(step.sheet)))
        case Unpack():
            return _unpack(step.value, sheets[step.sheet], pixels(layouts[step.sheet], planes(step.sheet)))
        case Mean():
            return _mean(step.value, sheets[step.source], layouts[step.source], planes(step.source))
    raise AssertionError(f"{step} does not work on planes")


def _run(pieces: list[_Piece], pool: Pool | None) -> Bound:
    if len(pieces) == 1:
        (only,) = pieces

        def run_one(values: dict[int, Any], image: int) -> None:
            only()

        return run_one

    def run(values: dict[int, Any], image: int) -> None:
        if pool is None:
            for piece in pieces:
                piece()
        else:
            pool.run(pieces)

    return run


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
    count = sheet.height * sheet.width

    def run(values: dict[int, Any], image: int) -> None:
        out = values[value].view(sheet.images, sheet.channels)[image]
        torch.sum(rows, 1, out=out)
        out.div_(count)

    return run
