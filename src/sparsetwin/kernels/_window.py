"""Windows over planes: max pooling, and the split of planes into the phases that a strided convolution reads."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._planes import PlaneLayout
from sparsetwin.kernels._specification import LINE_BYTES, element_format, lanes_of
from sparsetwin.kernels._target import Target, checked_target
from sparsetwin.kernels._team import KernelPiece
from sparsetwin.kernels._window_ir import WindowArgument, WindowSpecification

Pair = tuple[int, int]
_WORTH = 1 << 15  # loads below which sharing them costs more than it saves


@dataclass(frozen=True, kw_only=True)
class Window:
    """A pooling window; pairs are (vertical, horizontal). Padding reads as zero."""

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)

    def out_size(self, height: int, width: int) -> Pair:
        """Return height and width of the result."""
        sizes = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        rows, columns = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return rows, columns

    def least_pitch(self, width: int) -> int:
        """Return the least pitch of input planes with enough zero columns between the rows."""
        _, columns = self.out_size(1 + self.kernel[0], width)
        right = (columns - 1) * self.stride[1] + self.kernel[1] - self.padding[1] - width
        return width + max(0, right, self.padding[1])

    def lead(self, pitch: int) -> int:
        """Return how many zeros must lie before the first row of an input plane."""
        return self.padding[0] * pitch + self.padding[1]

    def body(self, height: int, width: int, pitch: int, dtype: torch.dtype = torch.float32) -> int:
        """Return how many elements behind the first of an input plane the kernel may read, whatever the target."""
        rows, columns = self.out_size(height, width)
        last = (rows - 1) * self.stride[0] + self.kernel[0] - 1 - self.padding[0]
        line = LINE_BYTES // dtype.itemsize
        whole = -(-columns // line) * line  # vectors are loaded whole
        return max(0, last) * pitch + whole * self.stride[1] + self.kernel[1]


class PlaneWindow:
    """The largest element of each window of each plane, from planes to planes.

    Elements must not be negative unless the window has one element: it is then a copy of some rows and columns. NaN is
    larger than all others. Calls may run at once.

    Args:
        window: Its size, stride (horizontally 1 or 2) and padding.
        source: The input's layout, in one phase; margins as `Window.margins` says, ``lead`` for the padding.
        destination: The output's layout; one of its phases is written.
        origin: First row and column read, before padding; what is behind the image's end is left out.
        phase: Which of the output's phases is written.
        target: What to compile for, or its name; this machine's best by default.

    Raises:
        ConfigError: If a layout does not fit, or no kernel can be made here.
    """

    def __init__(
        self,
        window: Window,
        *,
        source: PlaneLayout,
        destination: PlaneLayout,
        origin: Pair = (0, 0),
        phase: Pair = (0, 0),
        target: Target | str | None = None,
    ) -> None:
        chosen = checked_target(target)
        self.source, self.destination = source, destination
        height, width = source.height - origin[0], source.width - origin[1]
        self._rows, self._columns = window.out_size(height, width)
        start = (origin[0] - window.padding[0]) * source.pitch + origin[1] - window.padding[1]
        self._check(window, origin)
        element, size = element_format(source.dtype), source.dtype.itemsize
        lanes = lanes_of(chosen, element)
        self._first = size * (source.lead + start)
        self._step = size * window.stride[0] * source.pitch
        each = destination.phases[0] * destination.phases[1]
        self._out_plane = size * each * destination.plane
        which = phase[0] * destination.phases[1] + phase[1]
        self._out_first = size * (which * destination.plane + destination.lead)
        self._vectors, self._last_lanes = divmod(self._columns, lanes)
        masked = self._last_lanes > 0
        end = (self._rows - 1) * destination.pitch + (self._vectors + masked) * lanes
        spills = masked and destination.lead + end <= destination.plane  # partial stores are slow on some processors
        self._kernel: Kernel = kernel(
            WindowSpecification(
                target=chosen,
                kernel=window.kernel,
                step=window.stride[1],
                masked=masked,
                spills=spills,
                element=element,
            )
        )
        self._work = source.channels * self._rows * self._columns * window.kernel[0] * window.kernel[1]

    def _check(self, window: Window, origin: Pair) -> None:
        source, out = self.source, self.destination
        fits = self._rows <= out.phase_rows and self._columns <= out.phase_columns
        alike = source.channels == out.channels and source.dtype == out.dtype
        if source.phases != (1, 1) or not alike or not fits or self._rows * self._columns < 1:
            raise ConfigError(f"{window} of {source} is {self._rows} x {self._columns}; it does not fit {out}")
        shift = origin[0] * source.pitch + origin[1]
        body = shift + window.body(source.height - origin[0], source.width - origin[1], source.pitch, source.dtype)
        pitch = source.width if window.kernel == (1, 1) else window.least_pitch(source.width)
        lead = window.lead(source.pitch) if origin == (0, 0) else 0
        if source.pitch < pitch or source.lead < lead or source.plane < source.lead + body:
            raise ConfigError(f"planes {source} have margins too small for {window} from {origin}")

    def bound(self, planes: Tensor, *, out: Tensor, threads: int = 1) -> list[KernelPiece]:
        """Return the work of a call on tensors that stay where they are; it may be run again and again.

        Args:
            planes: (N, elements), in the layout ``source``.
            out: (N, elements), in the layout ``destination``.
            threads: Into how many pieces the channels of an image are cut at most.

        Raises:
            ConfigError: If a tensor's shape, dtype or layout is another one.
        """
        images = planes.shape[0]
        self.source.check(planes, "planes", images)
        self.destination.check(out, "out", images)
        channels, size = self.source.channels, self.source.dtype.itemsize
        parts = min(threads, channels) if self._work >= _WORTH else 1
        pieces: list[KernelPiece] = []
        for image in range(images):
            table = (ctypes.c_int64 * len(WindowArgument))(
                planes.data_ptr() + size * image * self.source.elements + self._first,
                size * self.source.plane,
                size * self.source.pitch,
                self._step,
                out.data_ptr() + size * image * self.destination.elements + self._out_first,
                self._out_plane,
                size * self.destination.pitch,
                self._rows,
                self._vectors,
                self._last_lanes,
            )
            for part in range(parts):
                begin, end = channels * part // parts, channels * (part + 1) // parts
                pieces.append(KernelPiece(self._kernel, table, (begin, end, 0, 0)))
        return pieces

    @torch.no_grad()
    def __call__(self, planes: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the windows' maxima, in the layout ``destination``; new planes by default."""
        out = self.destination.empty(planes.shape[0]) if out is None else out
        for piece in self.bound(planes, out=out):
            piece()
        return out
