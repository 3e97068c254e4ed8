"""How values lie in planes: images as they are, tokens as images one row high, a chunk of tokens each."""

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from sparsetwin.kernels import PlaneLayout, Transpose
from sparsetwin.runtime._graph import Pair, Value

CHUNK = 128  # tokens of one image, about; their features then stay in the cache from layer to layer


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The planes that hold a value: so many images of channels, height and width, split in phases or not."""

    images: int
    channels: int
    height: int
    width: int
    phases: Pair = (1, 1)
    tokens: int | None = None  # in all images together; None for images of pixels
    factor: float = field(default=1.0, compare=False, repr=False)  # a tensor's numbers are multiplied with it here

    def taken(self, image: int) -> int:
        """Return how many tokens an image holds; the last may hold fewer."""
        assert self.tokens is not None
        return min(self.width, self.tokens - image * self.width)


def sheet_of(value: Value | None) -> Sheet | None:
    """Return how a float32 value lies in planes; None if it cannot.

    Images (N, C, H, W) keep their shape. The last axis of tokens (..., features) becomes the channels.

    >>> sheet_of(Value(shape=(2, 100, 64), dtype=torch.float32))
    Sheet(images=2, channels=64, height=1, width=100, phases=(1, 1), tokens=200)
    """
    if value is None or value.dtype != torch.float32 or len(value.shape) not in (2, 3, 4) or 0 in value.shape:
        return None
    if len(value.shape) == 4:
        images, channels, height, width = value.shape
        return Sheet(images=images, channels=channels, height=height, width=width)
    tokens = torch.Size(value.shape[:-1]).numel()
    images = -(-tokens // CHUNK)
    return Sheet(images=images, channels=value.shape[-1], height=1, width=-(-tokens // images), tokens=tokens)


def pixels(layout: PlaneLayout, planes: Tensor) -> Tensor:
    """Return a view of one image's pixels, (channels, height, width), of planes (1, elements) in one phase."""
    strides = (layout.plane, layout.pitch, 1)
    size = (layout.channels, layout.height, layout.width)
    return planes.as_strided(size, strides, planes.storage_offset() + layout.lead)


def pack_image(sheet: Sheet, value: Tensor, image: int, view: Tensor) -> None:
    """Copy what one image holds of a tensor into its pixels, as `pixels` returned them."""
    if sheet.tokens is None:
        found = value[image]
        view.copy_(found if sheet.factor == 1 else found * sheet.factor)
        return
    rows, across = _rows(sheet, value, image), view[:, 0, : sheet.taken(image)]
    rows = rows if sheet.factor == 1 else rows * sheet.factor
    if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]:
        _transpose(rows.dtype, across.dtype)(rows, out=across)
    else:
        across.copy_(rows.t())


def unpack_image(sheet: Sheet, view: Tensor, value: Tensor, image: int) -> None:
    """Copy an image's pixels into its part of a tensor, which is contiguous for tokens."""
    if sheet.tokens is None:
        rows = value[image].copy_(view)
    else:
        rows = _rows(sheet, value, image)
        _transpose(view.dtype, rows.dtype)(view[:, 0, : sheet.taken(image)], out=rows)
    if sheet.factor != 1:
        rows.mul_(1 / sheet.factor)


def _rows(sheet: Sheet, value: Tensor, image: int) -> Tensor:
    """Return the tokens of one image, (tokens, features): a view where the tensor's strides allow one."""
    start = image * sheet.width
    return value.reshape(-1, sheet.channels)[start : start + sheet.taken(image)]


@cache
def _transpose(source: torch.dtype, destination: torch.dtype) -> Transpose:
    return Transpose(source=source, destination=destination)
