"""The sparse kernels of a network's nodes; a layer's kept weights are packed once for each way of cutting them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparsetwin.kernels import (
    Activation,
    ConvolutionGeometry,
    CSRBlocks,
    DenseConvolution,
    DenseTiles,
    KeptWeight,
    PlaneLayout,
    SparseConvolution,
    Tiling,
    convolution_matrix,
)
from sparsetwin.runtime._graph import Affine, Convolution, Layer, Linear, Node, with_weight
from sparsetwin.runtime._half import Half
from sparsetwin.runtime._steps import Product

Key = tuple[int, int | None, bool]
DEFAULT = Tiling()


@dataclass(frozen=True, eq=False)
class Packed:
    """Sparse matrices by the node whose weight they hold, and by how they are cut; filled on demand.

    ``tiles`` are whole weights in bfloat16; they are made anew from the graph's weights, not written to files.
    """

    matrices: dict["Key", CSRBlocks] = field(default_factory=dict)
    tiles: dict[int, DenseTiles] = field(default_factory=dict)
    half: Half | None = None  # how kernels compute in float16; the matrices are as for float32

    @property
    def dtype(self) -> torch.dtype:
        """Of the planes that kernels take."""
        return torch.float32 if self.half is None else torch.float16

    def unscaled(self) -> "Packed":
        """Return what makes kernels that take values as they are; itself, or without any matrix."""
        return self if self.half is None else Packed(half=replace(self.half, exponents={}))

    def drop_others(self, node: Node, tiling: Tiling) -> None:
        """Keep only the matrix of one tiling of a node."""
        for key in [key for key in self.matrices if key[0] == node.output and key != matrix_key(node, tiling)]:
            del self.matrices[key]

    def convolution(
        self,
        node: Node,
        geometry: ConvolutionGeometry,
        *,
        tiling: Tiling = DEFAULT,
        source: PlaneLayout | None = None,
        destination: PlaneLayout | None = None,
    ) -> SparseConvolution:
        """Return a node's kernel for images of one size.

        Args:
            node: A node that can work on planes and is no pooling.
            geometry: The convolution that it is.
            tiling: How it is cut.
            source: The input's layout; the smallest by default.
            destination: The output's layout; the smallest by default.
        """
        key = matrix_key(node, tiling)
        weight, bias = self.matrices.get(key), _bias_of(node)
        if self.half is not None:
            source = geometry.input_layout(dtype=self.dtype) if source is None else source
            tiling = replace(tiling, target=self.half.target)
            if weight is None:
                plain = weight_of(node, geometry)
                weight = convolution_matrix(plain, geometry=geometry, source=source, tiling=tiling)
            if isinstance(node.operation, Layer):
                self.matrices[key] = weight
            weight = weight.in_half(self.half.weight_factor(node))
            bias = None if bias is None else bias * self.half.bias_factor(node)
        made = SparseConvolution(
            weight_of(node, geometry) if weight is None else weight,
            geometry=geometry,
            bias=bias,
            activation=activation_of(node),
            residual=len(node.inputs) > 1,
            source=source,
            destination=destination,
            tiling=tiling,
        )
        if isinstance(node.operation, Layer) and self.half is None:
            self.matrices[key] = made.matrix
        return made

    def for_step(
        self, step: Product, source: PlaneLayout, destination: PlaneLayout, tiling: Tiling
    ) -> SparseConvolution:
        """Return the kernel of a step between two layouts."""
        return self.convolution(step.node, step.geometry, tiling=tiling, source=source, destination=destination)

    def dense_convolution(
        self,
        node: Node,
        geometry: ConvolutionGeometry,
        *,
        tiling: Tiling = DEFAULT,
        source: PlaneLayout | None = None,
        destination: PlaneLayout | None = None,
    ) -> DenseConvolution:
        """Return a layer's dense bfloat16 kernel, as `convolution` does the sparse one."""
        operation = node.operation
        assert isinstance(operation, Layer)
        weight: DenseTiles | Tensor | None = self.tiles.get(node.output)
        bias = operation.bias
        if weight is None:
            weight = with_weight(operation).weight.reshape(geometry.out_channels, -1, *geometry.kernel)
            weight = weight if self.half is None else weight * self.half.weight_factor(node)
        if self.half is not None:
            source = geometry.input_layout(dtype=self.dtype) if source is None else source
            bias = None if bias is None else bias * self.half.bias_factor(node)
        made = DenseConvolution(
            weight,
            geometry=geometry,
            bias=bias,
            activation=activation_of(node),
            residual=len(node.inputs) > 1,
            source=source,
            destination=destination,
            tiling=tiling,
        )
        self.tiles[node.output] = made.weight
        return made


def matrix_key(node: Node, tiling: Tiling) -> "Key":
    """Return what tells a node's matrices apart: the channels of a block, and whether values are narrow."""
    return (node.output, tiling.block, tiling.narrow)


def weight_of(node: Node, geometry: ConvolutionGeometry) -> KeptWeight | Tensor:
    """Return a node's weight as that of a convolution; elementwise nodes have a diagonal one."""
    operation = node.operation
    match operation:
        case Convolution():
            return operation.weight if operation.kept is None else operation.kept
        case Linear():
            shape = (*operation.weight.shape, 1, 1)
            return operation.weight.reshape(shape) if operation.kept is None else operation.kept.reshaped(shape)
        case Affine():
            return operation.scale.reshape(-1, 1, 1, 1)
    return torch.ones(geometry.out_channels, 1, 1, 1, dtype=torch.float32, device="cpu")


def _bias_of(node: Node) -> Tensor | None:
    operation = node.operation
    if isinstance(operation, Affine):
        return operation.shift
    return operation.bias if isinstance(operation, Layer) else None


def activation_of(node: Node) -> Activation | None:
    """Return the activation that a node applies at its store."""
    found: Activation | None = getattr(node.operation, "activation", None)
    return found


def is_narrow(node: Node) -> bool:
    """Tell whether a layer's weight is kept in fewer bits than float32."""
    operation = node.operation
    return isinstance(operation, Layer) and operation.kept is not None and operation.kept.is_narrow


def density_of(node: Node) -> float:
    """Return the fraction of a layer's weights that are not zero."""
    operation = node.operation
    assert isinstance(operation, Layer)
    if operation.kept is not None:
        return operation.kept.density
    return int(operation.weight.count_nonzero()) / operation.weight.numel()
