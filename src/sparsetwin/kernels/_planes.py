"""Activations of convolutions: one padded plane a channel, so that a tap is nothing but an offset.

Rows of a plane lie at a fixed pitch. The zero columns at the end of a row are its right padding and the left padding of
the next row; zeros before the first and behind the last row are the padding above and below. A convolution with a
stride reads its input split into phases, one plane for each remainder of the coordinates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import check_dense, check_float32
from sparsetwin.kernels._specification import LINE_BYTES


@dataclass(frozen=True, kw_only=True)
class PlaneLayout:
    """Where element (channel, y, x) of an image lies. Lengths are elements; `make_layout` rounds them.

    The phase of (y, x) is ``(y % phases[0], x % phases[1])``; within its plane it lies at
    ``lead + (y // phases[0]) * pitch + x // phases[1]``.
    """

    channels: int
    height: int  # of the image
    width: int
    phases: tuple[int, int]
    pitch: int
    lead: int  # zeros before the first row
    plane: int  # from plane to plane
    elements: int  # of an image, all planes and what a vector may read behind them
    dtype: torch.dtype = torch.float32  # of the planes; images are float32 always

    @property
    def line(self) -> int:
        """Elements of a cache line."""
        return LINE_BYTES // self.dtype.itemsize

    @property
    def phase_rows(self) -> int:
        """Rows of the largest phase."""
        return -(-self.height // self.phases[0])

    @property
    def phase_columns(self) -> int:
        """Columns of the largest phase."""
        return -(-self.width // self.phases[1])

    def empty(self, images: int) -> Tensor:
        """Return planes of zeros, (images, elements). What lies between the images' pixels must stay zero."""
        return torch.zeros(images, self.elements, dtype=self.dtype, device="cpu")

    @torch.no_grad()
    def pack(self, images: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Copy images into planes.

        Args:
            images: (N, C, H, W), float32, any strides.
            out: (N, elements), as `empty` returned it; new by default.

        Returns:
            ``out``.

        Raises:
            ConfigError: If the shape or dtype is another one.
        """
        check_float32(images, "the images")
        if tuple(images.shape[1:]) != (self.channels, self.height, self.width) or images.dim() != 4:
            expected = (self.channels, self.height, self.width)
            raise ConfigError(f"images have shape {tuple(images.shape)}; expected (N, {', '.join(map(str, expected))})")
        out = self.empty(images.shape[0]) if out is None else out
        self.check(out, "out", images.shape[0])
        for row, column, view in self._views(out):
            view.copy_(images[:, :, row :: self.phases[0], column :: self.phases[1]])
        return out

    @torch.no_grad()
    def unpack(self, planes: Tensor) -> Tensor:
        """Copy planes back into contiguous images, (N, C, H, W), float32."""
        self.check(planes, "planes", planes.shape[0])
        images = torch.empty(planes.shape[0], self.channels, self.height, self.width, dtype=torch.float32, device="cpu")
        for row, column, view in self._views(planes):
            images[:, :, row :: self.phases[0], column :: self.phases[1]] = view
        return images

    def check(self, planes: Tensor, name: str, images: int) -> None:
        """Refuse a tensor that cannot hold so many images in this layout.

        Raises:
            ConfigError: By ``name``.
        """
        check_dense(planes, name, self.dtype)
        if tuple(planes.shape) != (images, self.elements) or not planes.is_contiguous():
            raise ConfigError(
                f"{name}: shape {tuple(planes.shape)}, strides {planes.stride()}; "
                f"expected contiguous planes ({images}, {self.elements})"
            )

    def _views(self, planes: Tensor) -> list[tuple[int, int, Tensor]]:
        """Return for each phase that has pixels its coordinates and a view of them, (N, C, rows, columns)."""
        found = []
        per_channel = self.phases[0] * self.phases[1] * self.plane
        for row in range(min(self.phases[0], self.height)):
            for column in range(min(self.phases[1], self.width)):
                rows = -(-(self.height - row) // self.phases[0])
                columns = -(-(self.width - column) // self.phases[1])
                start = (row * self.phases[1] + column) * self.plane + self.lead
                shape = (planes.shape[0], self.channels, rows, columns)
                strides = (self.elements, per_channel, self.pitch, 1)
                found.append((row, column, planes.as_strided(shape, strides, planes.storage_offset() + start)))
        return found


def make_layout(
    *,
    channels: int,
    height: int,
    width: int,
    phases: tuple[int, int] = (1, 1),
    pitch: int,
    lead: int = 0,
    body: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlaneLayout:
    """Return a layout with at least these lengths, rounded to cache lines.

    Args:
        channels: Of the images.
        height: Of the images.
        width: Of the images.
        phases: The stride of the convolution that reads it.
        pitch: Elements from row to row; the columns of a phase and the zeros behind them.
        lead: Elements before the first row.
        body: Elements from the first row to the end of what is read or written, beyond the rows themselves.
        dtype: Of the planes.

    Raises:
        ConfigError: If a number is out of range.
    """
    if min(channels, height, width, *phases) < 1 or lead < 0:
        raise ConfigError(f"no planes for {channels} x {height} x {width} in phases {phases}, lead {lead}")
    if pitch < -(-width // phases[1]):
        raise ConfigError(f"a pitch of {pitch} is less than the {-(-width // phases[1])} columns of a phase")
    rows = -(-height // phases[0])
    line = LINE_BYTES // dtype.itemsize
    lead = -(-lead // line) * line
    body = max(body, -(-rows * pitch // line) * line)  # a kernel that writes the plane fills whole vectors
    plane = (-(-(lead + body) // line) | 1) * line  # odd: planes do not compete for the same cache lines
    elements = channels * phases[0] * phases[1] * plane + 2 * line
    return PlaneLayout(
        channels=channels,
        height=height,
        width=width,
        phases=phases,
        pitch=pitch,
        lead=lead,
        plane=plane,
        elements=elements,
        dtype=dtype,
    )
