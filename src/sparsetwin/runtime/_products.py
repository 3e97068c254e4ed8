"""The sparse kernels of a network's nodes; a layer's kept weights are packed once for each way of cutting them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsetwin.kernels import (
    Activation,
    ConvolutionGeometry,
    CSRBlocks,
    KeptWeight,
    PlaneLayout,
    SparseConvolution,
    Tiling,
)
from sparsetwin.runtime._graph import Affine, Convolution, Layer, Linear, Node
from sparsetwin.runtime._steps import Product

Key = tuple[int, int | None, bool]
DEFAULT = Tiling()


@dataclass(frozen=True, eq=False)
class Packed:
    """Sparse matrices by the node whose weight they hold, and by how they are cut; filled on demand."""

    matrices: dict["Key", CSRBlocks] = field(default_factory=dict)

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
        made = SparseConvolution(
            self.matrices[key] if key in self.matrices else weight_of(node, geometry),
            geometry=geometry,
            bias=_bias_of(node),
            activation=activation_of(node),
            residual=len(node.inputs) > 1,
            source=source,
            destination=destination,
            tiling=tiling,
        )
        if isinstance(node.operation, Layer):
            self.matrices[key] = made.matrix
        return made

    def for_step(
        self, step: Product, source: PlaneLayout, destination: PlaneLayout, tiling: Tiling
    ) -> SparseConvolution:
        """Return the kernel of a step between two layouts."""
        return self.convolution(step.node, step.geometry, tiling=tiling, source=source, destination=destination)


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
    return torch.ones(geometry.out_channels, 1, 1, 1)


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
