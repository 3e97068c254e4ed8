"""Dense convolutions in bfloat16 on the planes of the sparse ones, for layers with too many weights for those."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sparsetwin.errors import ConfigError
from sparsetwin.kernels._blocks import check_float32
from sparsetwin.kernels._cache import Kernel, kernel
from sparsetwin.kernels._convolution import check_call, columns_kept, tap_offsets
from sparsetwin.kernels._dense_ir import DEPTH, DenseArgument, DenseSpecification, block_shape
from sparsetwin.kernels._dot import Dot, host_dot
from sparsetwin.kernels._dot_ir import SIDE
from sparsetwin.kernels._geometry import ConvolutionGeometry, convolution_limits
from sparsetwin.kernels._launch import Epilogue, Tiling, run_pieces
from sparsetwin.kernels._planes import PlaneLayout
from sparsetwin.kernels._pool import Pool
from sparsetwin.kernels._product import padded_pitch
from sparsetwin.kernels._specification import Activation, element_format
from sparsetwin.kernels._team import KernelPiece

_Table = ctypes.c_int64 * len(DenseArgument)
_COLUMNS = 224  # of a tile: its panel is packed once and read for each block of rows
_DEPTH = 1024  # of a block of the sums: its rows of weights stay near while the columns of a panel pass
_SHARED = 1 << 18  # multiply-adds below which threads do not share the work


class Panels:
    """Memory in which kernels pack activations and leave sums: a part for each piece that may run at a time.

    Nothing in it outlives a kernel, so that kernels which run one after the other share it.
    """

    def __init__(self, byte_count: int) -> None:
        self.byte_count = byte_count
        self._parts: list[Tensor] = []

    def part(self, number: int) -> int:
        """Return the address of a part; the same one each time."""
        while len(self._parts) <= number:
            self._parts.append(torch.empty(self.byte_count, dtype=torch.uint8, device="cpu"))
        return self._parts[number].data_ptr()


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseTiles:
    """A weight rounded to bfloat16, in tiles as an instruction reads them; zeros fill the last tiles."""

    dot: Dot
    groups: int
    rows: int  # of a group
    depth: int  # of a group's sums
    tiles: Tensor  # bfloat16, (groups, tile rows, tiles along the sums, 512)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, *, groups: int = 1, dot: Dot) -> "DenseTiles":
        """Take a weight, (rows of all groups, ...), float32, on the CPU; axes behind the first are flattened.

        Raises:
            ConfigError: If the dtype or device is another one, or it has no elements.
        """
        check_float32(weight, "the weight")
        if weight.numel() == 0 or weight.shape[0] % groups:
            raise ConfigError(f"a weight of shape {tuple(weight.shape)} has no kernel in {groups} groups")
        rows, depth = weight.shape[0] // groups, weight[0].numel()
        high, along = -(-rows // SIDE), -(-depth // DEPTH)
        whole = torch.zeros(groups, high * SIDE, along * DEPTH, dtype=torch.bfloat16, device="cpu")
        whole[:, :rows, :depth] = weight.detach().reshape(groups, rows, depth)
        parts = whole.view(groups, high, SIDE, along, SIDE, 2)  # rows of a tile, tiles along, pairs of a tile
        by_rows = dot.name == "amx"
        order = (0, 1, 3, 2, 4, 5) if by_rows else (0, 1, 3, 4, 2, 5)
        tiles = parts.permute(order).reshape(groups, high, along, SIDE * DEPTH)
        return cls(dot=dot, groups=groups, rows=rows, depth=depth, tiles=tiles.contiguous())


class DenseConvolution:
    """``y = activation(conv2d(x, W) + bias + residual)`` in bfloat16, float32 sums, on the sparse one's planes.

    Planes are float32 or float16: activations are rounded to bfloat16, to nearest even, where they are packed, weights
    when the convolution is made. No weight is skipped. Any number of threads gives the same bits.

    Args:
        weight: (out, in / groups, kh, kw), float32; or `DenseTiles` of it.
        geometry: As for `SparseConvolution`.
        bias: (out,), float32.
        activation: Fused at the store.
        residual: Whether each call brings a residual, in the output's layout.
        source: The input's layout; the smallest by default.
        destination: The output's layout, of the same pitch; the smallest by default.
        tiling: ``vectors`` of 16 columns a tile, input channels a ``block``; chosen by the sizes by default.

    Raises:
        ConfigError: If something does not fit, or this machine has no instruction for it.
    """

    def __init__(
        self,
        weight: DenseTiles | Tensor,
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
        if min((number for number in (tiling.vectors, tiling.block) if number is not None), default=1) < 1:
            raise ConfigError(
                f"a tiling of {tiling.vectors} vectors, {tiling.block} channels; expected at least 1 each"
            )
        reason = convolution_limits(geometry)
        if reason is not None:
            raise ConfigError(reason)
        self.geometry = geometry
        self.source = geometry.input_layout() if source is None else source
        dtype = self.source.dtype
        if destination is None:
            destination = geometry.output_layout(self.source.pitch, dtype=dtype)
        self.destination = destination
        geometry.check_layouts(self.source, self.destination)
        self.weight = _tiles(weight, geometry)
        bias = _checked_bias(bias, geometry)
        self.epilogue = Epilogue(bias=bias, residual=residual, activation=activation)
        taps = geometry.kernel[0] * geometry.kernel[1]
        self._block = _block_depth(self.weight.depth, None if tiling.block is None else tiling.block * taps)
        self._columns = geometry.written(self.source.pitch, dtype)
        self._tile = _tile_columns(self._columns, tiling.vectors)
        self._keep = columns_kept(geometry, self.source)
        offsets, _ = tap_offsets(geometry, self.source)
        self._offsets = offsets.contiguous()
        self._kernel: Kernel = kernel(
            DenseSpecification(
                dot=self.weight.dot,
                bias=bias is not None,
                residual=residual,
                activation=activation,
                element=element_format(dtype),
            )
        )

    @property
    def panel_bytes(self) -> int:
        """Bytes that a piece of work needs to pack activations and leave sums, at most."""
        return self._panel_rows * 4 * padded_pitch(self._tile) + self._sum_rows * 4 * padded_pitch(self._tile)

    @torch.no_grad()
    def __call__(
        self, planes: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None, pool: Pool | None = None
    ) -> Tensor:
        """Convolve.

        Args:
            planes: (N, elements), float32, in the layout ``source``.
            residual: (N, elements), in the layout ``destination``; given exactly if the convolution was made for one.
            out: (N, elements), in the layout ``destination``, zero between the pixels; new by default.
            pool: Threads; the caller's alone by default.

        Returns:
            ``out``.

        Raises:
            ConfigError: If a tensor's shape, dtype or layout is another one, or ``out`` is an input.
        """
        out = self.destination.empty(planes.shape[0]) if out is None else out
        panels = Panels(self.panel_bytes)
        threads = pool.threads if pool else 1
        run_pieces(self.bound(planes, residual=residual, out=out, panels=panels, threads=threads), pool)
        return out

    def bound(
        self,
        planes: Tensor,
        *,
        residual: Tensor | None = None,
        out: Tensor,
        panels: Panels,
        first_part: int = 0,
        threads: int = 1,
    ) -> list[KernelPiece]:
        """Return the work of a call on tensors that stay where they are; it may be run again and again.

        Args:
            planes: As for a call.
            residual: As for a call.
            out: As for a call.
            panels: At least `panel_bytes` a part. With several threads each piece takes one of its own, else one
                serves all.
            first_part: The first that is taken.
            threads: Into how many pieces the work of an image is cut, about.

        Returns:
            Functions that may run in any order, and on any threads if there are several. They do not keep the tensors
            alive, nor the panels.

        Raises:
            ConfigError: As for a call, or if the panels are too small.
        """
        made = self.epilogue.residual
        images = check_call(planes, residual, out, source=self.source, destination=self.destination, with_residual=made)
        if panels.byte_count < self.panel_bytes:
            raise ConfigError(f"panels have {panels.byte_count} bytes a part; expected at least {self.panel_bytes}")
        several = threads > 1
        cut = self._cut(threads if images < threads and self._work >= _SHARED else 1)
        pieces: list[KernelPiece] = []
        for image in range(images):
            for groups, width, ranges in cut:
                panel = panels.part(first_part + (len(pieces) if several else 0))
                table = self._table(planes, residual, out, image)
                table[DenseArgument.FIRST_GROUP], table[DenseArgument.STOP_GROUP] = groups
                table[DenseArgument.TILE_COLUMNS] = width
                table[DenseArgument.PANEL] = panel
                table[DenseArgument.SUMS] = panel + self._panel_rows * 4 * padded_pitch(self._tile)
                pieces.append(KernelPiece(self._kernel, table, ranges))
        return pieces

    @torch.no_grad()
    def images(self, x: Tensor, *, residual: Tensor | None = None, pool: Pool | None = None) -> Tensor:
        """Do what ``torch.nn.functional.conv2d`` does, with both conversions of layout: (N, C, H, W) in and out."""
        across = None if residual is None else self.destination.pack(residual)
        return self.destination.unpack(self(self.source.pack(x), residual=across, pool=pool))

    @property
    def _panel_rows(self) -> int:
        return -(-min(self._block, self.weight.depth) // DEPTH) * SIDE

    @property
    def _sum_rows(self) -> int:
        """Rows of sums: those of a block, or all of a group if they wait for another block of the sums."""
        high = block_shape(self.weight.dot)[0]
        return high if self._block >= self.weight.depth else -(-self.weight.rows // high) * high

    @property
    def _work(self) -> int:
        return self.weight.groups * self.weight.rows * self.weight.depth * self._columns

    def _cut(self, threads: int) -> list[tuple[tuple[int, int], int, tuple[int, int, int, int]]]:
        """Cut by columns, then by groups or rows; return groups, a tile's columns, and ranges of each piece."""
        groups, rows = self.weight.groups, self.weight.rows
        if threads == 1:
            return [((0, groups), self._tile, (0, self._columns, 0, rows))]
        high, wide = block_shape(self.weight.dot)
        narrow = max(2 * wide, -(-self._columns // (2 * threads) // wide) * wide)
        width = min(self._tile, narrow)
        tiles = -(-self._columns // width)
        ends = [min(self._columns, tile * width) for tile in _even(tiles, 2 * threads)]
        wanted = -(-threads // (len(ends) - 1))
        group_ends = _even(groups, wanted) if groups > 1 else [0, 1]
        row_ends = [0, rows] if groups > 1 else [min(rows, high * end) for end in _even(-(-rows // high), wanted)]
        return [
            ((first, stop), width, (begin, end, top, bottom))
            for begin, end in pairwise(ends)
            for first, stop in pairwise(group_ends)
            for top, bottom in pairwise(row_ends)
        ]

    def _table(
        self, planes: Tensor, residual: Tensor | None, out: Tensor, image: int
    ) -> "ctypes.Array[ctypes.c_int64]":
        weight, source, destination = self.weight, self.source, self.destination
        channels = source.phases[0] * source.phases[1] * source.plane
        size = source.dtype.itemsize
        behind = size * (image * destination.elements + destination.lead)
        found = {
            DenseArgument.INPUT: planes.data_ptr() + size * image * source.elements,
            DenseArgument.INPUT_GROUP: size * channels * (self.geometry.in_channels // weight.groups),
            DenseArgument.OFFSETS: self._offsets.data_ptr(),
            DenseArgument.DEPTH: weight.depth,
            DenseArgument.BLOCK_DEPTH: self._block,
            DenseArgument.WEIGHTS: weight.tiles.data_ptr(),
            DenseArgument.WEIGHTS_GROUP: 2 * weight.tiles[0].numel(),
            DenseArgument.WEIGHTS_ROW: 2 * weight.tiles[0, 0].numel(),
            DenseArgument.ROWS: weight.rows,
            DenseArgument.PANEL_PITCH: 4 * padded_pitch(self._tile),
            DenseArgument.SUMS_PITCH: 4 * padded_pitch(self._tile),
            DenseArgument.OUTPUT: out.data_ptr() + behind,
            DenseArgument.OUTPUT_PITCH: size * destination.plane,
            DenseArgument.RESIDUAL_PITCH: size * destination.plane,
            DenseArgument.KEEP: self._keep.data_ptr(),
        }
        if self._block < weight.depth:
            found[DenseArgument.SUMS_STEP] = 4 * padded_pitch(self._tile) * block_shape(weight.dot)[0]
        if self.epilogue.bias is not None:
            found[DenseArgument.BIAS] = self.epilogue.bias.data_ptr()
        if residual is not None:
            found[DenseArgument.RESIDUAL] = residual.data_ptr() + behind
        return _Table(*(found.get(argument, 0) for argument in DenseArgument))


def _checked_bias(bias: Tensor | None, geometry: ConvolutionGeometry) -> Tensor | None:
    if bias is None:
        return None
    check_float32(bias, "the bias")
    if tuple(bias.shape) != (geometry.out_channels,):
        raise ConfigError(f"the bias has shape {tuple(bias.shape)}; expected ({geometry.out_channels},)")
    return bias.detach().contiguous()


def _tiles(weight: DenseTiles | Tensor, geometry: ConvolutionGeometry) -> DenseTiles:
    """Return a weight's tiles, after a check of its shape."""
    per_group = geometry.in_channels // geometry.groups
    expected = (geometry.out_channels, per_group, *geometry.kernel)
    if isinstance(weight, Tensor):
        dot = host_dot()
        if dot is None:
            raise ConfigError("dense kernels need AMX or AVX-512's bfloat16, which this process cannot use")
        if tuple(weight.shape) != expected:
            raise ConfigError(f"the weight has shape {tuple(weight.shape)}; expected {expected}")
        return DenseTiles.from_dense(weight, groups=geometry.groups, dot=dot)
    sizes = (weight.groups, weight.groups * weight.rows, weight.depth)
    if sizes != (geometry.groups, geometry.out_channels, per_group * geometry.kernel[0] * geometry.kernel[1]):
        raise ConfigError(
            f"tiles of {sizes[1]} x {sizes[2]} in {sizes[0]} groups; expected those of a weight {expected}"
        )
    return weight


def _block_depth(depth: int, wanted: int | None) -> int:
    """Return how much of a sum is packed at a time, in whole tiles; at most 1024 by default, all blocks about equal.

    >>> _block_depth(576, None), _block_depth(2304, None), _block_depth(27, None), _block_depth(576, 100)
    (576, 768, 32, 128)
    """
    if wanted is None:
        wanted = -(-depth // -(-depth // _DEPTH))
    return -(-min(wanted, depth) // DEPTH) * DEPTH


def _tile_columns(columns: int, vectors: int | None) -> int:
    """Return the columns of a tile: at most 224 by default, all tiles about equal, in pairs of vectors.

    >>> _tile_columns(3200, None), _tile_columns(64, None), _tile_columns(48, None), _tile_columns(256, 4)
    (224, 64, 48, 64)
    """
    if vectors is not None:
        return max(SIDE, min(SIDE * vectors, columns))
    tiles = -(-columns // _COLUMNS)
    return min(columns, -(-columns // tiles // (2 * SIDE)) * 2 * SIDE)


def _even(count: int, parts: int) -> Sequence[int]:
    """Return the ends of about equal parts of so many things, from 0."""
    parts = max(1, min(parts, count))
    return [count * part // parts for part in range(parts + 1)]
