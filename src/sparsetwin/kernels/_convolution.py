"""Sparse convolutions by tap offsets: the product kernel on padded planes, without im2col."""

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import CSRBlocks, check_float32, density, packed
from sparsetwin.kernels._geometry import ConvolutionGeometry, convolution_limits
from sparsetwin.kernels._kept import KeptWeight
from sparsetwin.kernels._launch import (
    Addresses,
    Epilogue,
    Tiling,
    default_vectors,
    dense_vectors,
    run_pieces,
    tiled_product,
)
from sparsetwin.kernels._planes import PlaneLayout
from sparsetwin.kernels._pool import Pool
from sparsetwin.kernels._product import default_block, overlap
from sparsetwin.kernels._specification import Activation, Element, element_format
from sparsetwin.kernels._target import Target, checked_target
from sparsetwin.kernels._team import KernelPiece


class SparseConvolution:
    """``y = activation(conv2d(x, W) + bias + residual)`` for a sparse W, image by image, planes to planes.

    The output's planes can be the next convolution's input: their padding is zero. Kernel sizes, strides, paddings,
    dilations and groups are free, depthwise among them. Pruned weights pass nothing on, as in `SparseProduct`.

    Args:
        weight: (out, in / groups, kh, kw), float32; zeros are pruned. Or a `KeptWeight`, or what `convolution_matrix`
            made of it. Rounded to float16 for such planes.
        geometry: Sizes, stride, padding, dilation, groups.
        bias: (out,), float32.
        activation: Fused at the store.
        residual: Whether each call brings a residual, in the output's layout.
        source: The input's layout; the smallest by default. In float16 the target must compute with that.
        destination: The output's layout, of the same pitch and dtype; the smallest by default.
        tiling: How the product is cut; chosen by the sizes by default, one block with groups.

    Raises:
        ConfigError: If something does not fit, `convolution_limits` has a reason, or no kernel can be made here.
    """

    def __init__(
        self,
        weight: CSRBlocks | KeptWeight | Tensor,
        *,
        geometry: ConvolutionGeometry,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        residual: bool = False,
        source: PlaneLayout | None = None,
        destination: PlaneLayout | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        tiling = tiling or Tiling()
        chosen = checked_target(tiling.target)
        reason = convolution_limits(geometry)
        if reason is not None:
            raise ConfigError(reason)
        self.geometry = geometry
        self.source = geometry.input_layout() if source is None else source
        dtype = self.source.dtype
        element = element_format(dtype)
        if destination is None:
            destination = geometry.output_layout(self.source.pitch, dtype=dtype)
        self.destination = destination
        geometry.check_layouts(self.source, self.destination)
        columns = geometry.written(self.source.pitch, dtype)
        width = tiling.vectors or _default_width(weight, geometry, columns, chosen, element)
        self.matrix = _matrix(weight, geometry, tiling, width, chosen, element)
        if bias is not None:
            check_float32(bias, "the bias")
            bias = bias.detach().contiguous()
        self._residual = residual
        self._keep = columns_kept(geometry, self.source)
        self._product = tiled_product(
            self.matrix if element == "float32" else self.matrix.in_half(),
            self.matrix.offsets(*tap_offsets(geometry, self.source)),
            columns=columns,
            target=chosen,
            vectors=width,
            epilogue=Epilogue(bias=bias, residual=residual, activation=activation),
            keep=True,
            element=element,
        )

    @torch.no_grad()
    def __call__(
        self, planes: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None, pool: Pool | None = None
    ) -> Tensor:
        """Convolve.

        Args:
            planes: (N, elements), in the layout ``source``.
            residual: (N, elements), in the layout ``destination``; given exactly if the convolution was made for one.
            out: (N, elements), in the layout ``destination``, zero between the pixels; new by default.
            pool: Threads; the caller's alone by default.

        Returns:
            ``out``.

        Raises:
            ConfigError: If a tensor's shape, dtype or layout is another one, or ``out`` is an input.
        """
        out = self.destination.empty(planes.shape[0]) if out is None else out
        run_pieces(self.bound(planes, residual=residual, out=out, threads=pool.threads if pool else 1), pool)
        return out

    def bound(
        self, planes: Tensor, *, residual: Tensor | None = None, out: Tensor, threads: int = 1
    ) -> list[KernelPiece]:
        """Return the work of a call on tensors that stay where they are; it may be run again and again.

        Args:
            planes: As for a call.
            residual: As for a call.
            out: As for a call.
            threads: Into how many pieces the work is cut, about; images are pieces where there are enough of them.

        Returns:
            Functions that may run in any order, on any threads. They do not keep the tensors alive.

        Raises:
            ConfigError: As for a call.
        """
        images = check_call(
            planes, residual, out, source=self.source, destination=self.destination, with_residual=self._residual
        )
        pieces: list[KernelPiece] = []
        size = self.source.dtype.itemsize
        lead, pitch = size * self.destination.lead, size * self.destination.plane
        for image in range(images):
            at = Addresses(
                input=planes.data_ptr() + size * image * self.source.elements,
                output=out.data_ptr() + size * image * self.destination.elements + lead,
                output_pitch=pitch,
                residual=residual.data_ptr() + size * image * self.destination.elements + lead
                if residual is not None
                else 0,
                residual_pitch=pitch,
                keep=self._keep.data_ptr(),
            )
            pieces += self._product.pieces(at, threads=threads if images < threads else 1)
        return pieces

    @torch.no_grad()
    def images(self, x: Tensor, *, residual: Tensor | None = None, pool: Pool | None = None) -> Tensor:
        """Do what ``torch.nn.functional.conv2d`` does, with both conversions of layout: (N, C, H, W) in and out."""
        across = None if residual is None else self.destination.pack(residual)
        return self.destination.unpack(self(self.source.pack(x), residual=across, pool=pool))


def convolution_matrix(
    weight: KeptWeight | Tensor, *, geometry: ConvolutionGeometry, source: PlaneLayout, tiling: Tiling
) -> CSRBlocks:
    """Return the matrix that a convolution of such a weight would have.

    Args:
        weight: As for `SparseConvolution`.
        geometry: As for `SparseConvolution`.
        source: The input's layout.
        tiling: How the product is cut; chosen by the sizes by default.
    """
    target = checked_target(tiling.target)
    columns = geometry.written(source.pitch, source.dtype)
    element = element_format(source.dtype)
    width = tiling.vectors or _default_width(weight, geometry, columns, target, element)
    return _matrix(weight, geometry, tiling, width, target, element)


def _default_width(
    weight: CSRBlocks | KeptWeight | Tensor,
    geometry: ConvolutionGeometry,
    columns: int,
    target: Target,
    element: Element,
) -> int:
    kept = weight.kept / (weight.rows * weight.columns) if isinstance(weight, CSRBlocks) else density(weight)
    wanted = dense_vectors if kept == 1 and geometry.groups == 1 else default_vectors
    return wanted(columns, target, element)


def _matrix(
    weight: CSRBlocks | KeptWeight | Tensor,
    geometry: ConvolutionGeometry,
    tiling: Tiling,
    vectors: int,
    target: Target,
    element: Element,
) -> CSRBlocks:
    taps = geometry.kernel[0] * geometry.kernel[1]
    per_group = geometry.in_channels // geometry.groups
    expected = (geometry.out_channels, per_group, *geometry.kernel)
    if isinstance(weight, CSRBlocks):
        if (weight.rows, weight.columns) != (geometry.out_channels, per_group * taps):
            raise ConfigError(f"the matrix is {weight.rows} x {weight.columns}; expected that of a weight {expected}")
        return weight
    if tuple(weight.shape) != expected:
        raise ConfigError(f"the weight has shape {tuple(weight.shape)}; expected {expected}")
    channels = tiling.block
    if channels is None and geometry.groups > 1:
        channels = per_group
    elif channels is None:  # taps along a row read nearly the same lines
        kept = taps * density(weight)
        lines = geometry.kernel[0] * vectors
        channels = default_block(per_group, kept=kept, lines=lines, target=target, element=element)
    return packed(weight, channels * taps, narrow=tiling.narrow)


def check_call(
    planes: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    source: PlaneLayout,
    destination: PlaneLayout,
    with_residual: bool,
) -> int:
    """Refuse what is not a convolution's call; return its number of images.

    Raises:
        ConfigError: If a tensor's shape, dtype or layout is another one, or ``out`` is an input.
    """
    images = planes.shape[0]
    source.check(planes, "planes", images)
    destination.check(out, "out", images)
    if (residual is not None) != with_residual:
        raise ConfigError(f"residual={'given' if residual is not None else None}; made with {with_residual}")
    if residual is not None:
        destination.check(residual, "residual", images)
    if any(other is not None and overlap(out, other) for other in (planes, residual)):
        raise ConfigError("out shares memory with an input; partial sums in it would overwrite what is still read")
    return images


def tap_offsets(geometry: ConvolutionGeometry, source: PlaneLayout) -> tuple[Tensor, Tensor]:
    """Return where each column of the weight and each group of rows begins to read, in bytes."""
    taps = []
    for row in range(geometry.kernel[0]):
        for column in range(geometry.kernel[1]):
            (row_phase, down), (column_phase, right) = geometry.tap(0, row), geometry.tap(1, column)
            phase = row_phase * source.phases[1] + column_phase
            taps.append(phase * source.plane + source.lead + down * source.pitch + right)
    channel = source.phases[0] * source.phases[1] * source.plane
    per_group = geometry.in_channels // geometry.groups
    columns = _numbers(per_group).unsqueeze(1) * channel + torch.tensor(taps, dtype=torch.int64, device="cpu")
    group = _numbers(geometry.out_channels) // (geometry.out_channels // geometry.groups)
    size = source.dtype.itemsize
    return size * columns.reshape(-1), size * group * per_group * channel


def columns_kept(geometry: ConvolutionGeometry, source: PlaneLayout) -> Tensor:
    """Return integers of the planes' size, all ones where a column of the product is a pixel of the result, else 0."""
    height, width = geometry.out_size
    pitch = source.pitch
    kind = torch.int32 if source.dtype == torch.float32 else torch.int16
    keep = torch.zeros(geometry.written(pitch, source.dtype), dtype=kind, device="cpu")
    keep[: height * pitch].view(height, pitch)[:, :width] = -1
    return keep


def _numbers(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")
