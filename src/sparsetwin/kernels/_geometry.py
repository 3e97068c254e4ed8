"""The arithmetic of a convolution on planes: sizes, which tap reads which phase where, and what layouts it needs."""

from dataclasses import dataclass

import torch

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._planes import PlaneLayout, make_layout
from sparsetwin.kernels._specification import LINE_BYTES

Pair = tuple[int, int]
_REACH = 2**31 - 1  # bytes that 32-bit offsets span


@dataclass(frozen=True, kw_only=True)
class ConvolutionGeometry:
    """A two-dimensional convolution with zero padding; pairs are (vertical, horizontal)."""

    in_channels: int
    out_channels: int
    kernel: Pair
    height: int
    width: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        counts = (self.in_channels, self.out_channels, self.height, self.width, self.groups)
        if min(*counts, *self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise ConfigError(f"{self}: sizes must be positive and padding not negative")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ConfigError(f"{self.groups} groups do not divide {self.in_channels} and {self.out_channels} channels")
        if min(self.out_size) < 1:
            raise ConfigError(f"{self}: the kernel is larger than the padded image")

    @property
    def out_size(self) -> Pair:
        """Height and width of the result."""
        sizes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return height, width

    def tap(self, axis: int, index: int) -> Pair:
        """Return the phase that a tap reads along an axis, and by how far it is shifted there."""
        displacement = index * self.dilation[axis] - self.padding[axis]
        return displacement % self.stride[axis], displacement // self.stride[axis]

    def shifts(self, axis: int) -> Pair:
        """Return the least and the largest shift along an axis, 0 included."""
        found = [self.tap(axis, index)[1] for index in range(self.kernel[axis])]
        return min(0, *found), max(0, *found)

    def least_pitch(self) -> int:
        """Return the least pitch with enough zero columns between the rows."""
        least, largest = self.shifts(1)
        columns = -(-self.width // self.stride[1])
        return max(columns - least, self.out_size[1] + largest)

    def written(self, pitch: int, dtype: torch.dtype = torch.float32) -> int:
        """Return how many elements of a plane the kernel computes: all output rows, in whole cache lines."""
        line = LINE_BYTES // dtype.itemsize
        return -(-self.out_size[0] * pitch // line) * line

    def body(self, pitch: int, dtype: torch.dtype = torch.float32) -> int:
        """Return how many elements behind the first of an input plane the kernel may read."""
        return self.written(pitch, dtype) + self.shifts(0)[1] * pitch + self.shifts(1)[1]

    def input_layout(self, pitch: int | None = None, *, dtype: torch.dtype = torch.float32) -> PlaneLayout:
        """Return the smallest layout that the convolution can read, or that of a larger pitch."""
        pitch = self.least_pitch() if pitch is None else pitch
        return make_layout(
            channels=self.in_channels,
            height=self.height,
            width=self.width,
            phases=self.stride,
            pitch=pitch,
            lead=-self.shifts(0)[0] * pitch - self.shifts(1)[0],
            body=self.body(pitch, dtype),
            dtype=dtype,
        )

    def output_layout(self, pitch: int | None = None, *, dtype: torch.dtype = torch.float32) -> PlaneLayout:
        """Return the smallest layout that the convolution can write; its pitch is that of the input's phases."""
        height, width = self.out_size
        pitch = self.least_pitch() if pitch is None else pitch
        return make_layout(channels=self.out_channels, height=height, width=width, pitch=pitch, dtype=dtype)

    def check_layouts(self, source: PlaneLayout, target: PlaneLayout) -> None:
        """Refuse layouts in which a tap would read another row's pixels, or beyond the planes.

        Raises:
            ConfigError: With what is too small.
        """
        pitch, dtype = source.pitch, source.dtype
        if pitch < self.least_pitch():
            raise ConfigError(f"input planes have a pitch of {pitch}; expected at least {self.least_pitch()}")
        needs = (
            ("input", source, self.input_layout(pitch, dtype=dtype), self.body(pitch, dtype)),
            ("output", target, self.output_layout(pitch, dtype=dtype), self.written(pitch, dtype)),
        )
        for name, given, least, body in needs:
            sizes = ("channels", "height", "width", "phases", "pitch", "dtype")
            if any(getattr(given, field) != getattr(least, field) for field in sizes):
                raise ConfigError(f"{name} planes are {given}; expected the sizes of {least}")
            enough = given.lead >= least.lead and given.plane >= given.lead + body
            if not enough or given.elements < given.channels * given.phases[0] * given.phases[1] * given.plane:
                raise ConfigError(f"{name} planes {given} have margins too small; expected those of {least}")


def convolution_limits(geometry: ConvolutionGeometry) -> str | None:
    """Return why no kernel can run a convolution, or None if one can."""
    layouts = (geometry.input_layout(), geometry.output_layout())
    size = 4 * max(layout.elements for layout in layouts)
    if size > _REACH:
        return f"an image's planes have {size} bytes; 32-bit offsets reach {_REACH}"
    return None
