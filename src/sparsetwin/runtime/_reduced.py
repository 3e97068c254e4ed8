"""Dense bfloat16 kernels on planes, one more way to run a layer: where there are any, and a check of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetwin.kernels import ConvolutionGeometry, Dot, Pool, Tiling, host_dot, tiles_refused
from sparsetwin.runtime._graph import Layer, Node, with_weight
from sparsetwin.runtime._plain import activate
from sparsetwin.runtime._products import Packed, activation_of

_LARGEST_ERROR = 2e-2  # of bfloat16 against float32, relative to the largest result
LARGEST_ERROR_OF_ALL = 1e-1  # the same of a whole network: beyond that, something is wrong
_DEPTH = 512  # of the sums over a panel, besides the default
_ROWS = 8  # that a group must have for a dense kernel to be tried


@dataclass(kw_only=True, eq=False)
class DensePlanes:
    """Permission to run layers dense in bfloat16 on planes, by an instruction; gathers what a plan should tell."""

    dot: Dot
    notes: list[str] = field(default_factory=list)

    def suits(self, geometry: ConvolutionGeometry) -> bool:
        """Tell whether a layer has enough outputs for tiles of rows."""
        return geometry.out_channels // geometry.groups >= _ROWS

    def is_right(
        self, node: Node, geometry: ConvolutionGeometry, packed: Packed, *, tiling: Tiling, pool: Pool | None
    ) -> bool:
        """Tell whether a layer's dense kernel is near enough to float32 on random activations; note it if it is not."""
        operation = node.operation
        assert isinstance(operation, Layer)
        generator = torch.Generator().manual_seed(0)
        read, written = (geometry.in_channels, geometry.height, geometry.width), geometry.out_size
        x = torch.randn(1, *read, generator=generator, dtype=torch.float32, device="cpu")
        y = torch.randn(1, geometry.out_channels, *written, generator=generator, dtype=torch.float32, device="cpu")
        residual = y if len(node.inputs) > 1 else None
        found = packed.dense_convolution(node, geometry, tiling=tiling).images(x, residual=residual, pool=pool)
        whole = with_weight(operation)
        weight = whole.weight.reshape(whole.weight.shape[0], -1, *geometry.kernel)
        expected = F.conv2d(
            x, weight, whole.bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        expected = activate(expected if residual is None else expected + residual, activation_of(node))
        error = relative_error(found, expected)
        if error <= _LARGEST_ERROR:
            return True
        self.notes.append(f"{node.name}: dense planes ({self.dot.name}) are off by {error:.2g}, and left out")
        return False

    def is_near(self, name: str, found: Sequence[Any], expected: Sequence[Any]) -> bool:
        """Tell whether a program's results are near those in float32; note it if they are not."""
        error = largest_error(found, expected)
        if error <= LARGEST_ERROR_OF_ALL:
            return True
        self.notes.append(f"{name}: off by {error:.2g} as a whole, and left out")
        return False


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Return max|y - expected| / max|expected|; numbers that are equal, or both NaN, differ by nothing."""
    same = (y == expected) | (y.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (y - expected).abs())
    if difference.numel() == 0:
        return 0.0
    size = torch.where(expected.isfinite(), expected.abs(), 0.0).max()
    return float(difference.max() / size.clamp_min(torch.finfo(torch.float32).tiny))


def largest_error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return the largest `relative_error` of a call's results; NaN counts as the largest.

    >>> largest_error([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])])
    0.20000000298023224
    """
    errors = [
        relative_error(y, ref)
        for y, ref in zip(found, expected, strict=True)
        if isinstance(ref, Tensor) and ref.is_floating_point()
    ]
    return max(errors, key=lambda one: (math.isnan(one), one), default=0.0)


def dense_planes(*, allowed: bool) -> DensePlanes | None:
    """Return what permits dense bfloat16 kernels, if reduced precision is allowed and there is an instruction."""
    dot = host_dot() if allowed else None
    return None if dot is None else DensePlanes(dot=dot)


def other_panels(geometry: ConvolutionGeometry) -> list[Tiling]:
    """Return what to try beside the default: narrower and wider tiles, shorter sums over one panel."""
    columns, taps = geometry.written(geometry.least_pitch()), geometry.kernel[0] * geometry.kernel[1]
    found = [Tiling(vectors=vectors) for vectors, least in ((8, 128), (28, 224)) if columns > least]
    channels = max(1, _DEPTH // taps)
    return [*found, Tiling(block=channels)] if channels < geometry.in_channels // geometry.groups else found


def notes_of(found: DensePlanes | None, *, allowed: bool) -> list[str]:
    """Return what a plan tells about dense bfloat16 kernels: those that were wrong, and tiles that Linux refused."""
    refused = tiles_refused() if allowed else None
    notes = [] if found is None else found.notes
    return notes if refused is None else [*notes, refused]
