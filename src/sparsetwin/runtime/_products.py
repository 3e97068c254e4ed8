"""The sparse kernels of a network's nodes; a layer's kept weights are packed once for each way of cutting them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsetwin.kernels import Activation, ConvolutionGeometry, CSRBlocks, PlaneLayout, SparseConvolution, Tiling
from sparsetwin.runtime._graph import Affine, Convolution, Layer, Linear, Node
from sparsetwin.runtime._steps import Product

DEFAULT = Tiling()


@dataclass(frozen=True, eq=False)
class Packed:
    """Sparse matrices by the node whose weight they hold, and by the channels of a block; filled on demand."""

    matrices: dict[tuple[int, int | None], CSRBlocks] = field(default_factory=dict)

    def keep(self, tilings: Mapping[int, Tiling]) -> None:
        """Drop what tilings, by node, do not use."""
        wanted = {(node, tiling.block) for node, tiling in tilings.items()}
        for key in set(self.matrices) - wanted:
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
        key = (node.output, tiling.block)
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


def weight_of(node: Node, geometry: ConvolutionGeometry) -> Tensor:
    """Return a node's weight as that of a convolution; elementwise nodes have a diagonal one."""
    operation = node.operation
    match operation:
        case Convolution():
            return operation.weight
        case Linear():
            return operation.weight.reshape(*operation.weight.shape, 1, 1)
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


def density_of(node: Node) -> float:
    """Return the fraction of a layer's weights that are not zero."""
    operation = node.operation
    assert isinstance(operation, Layer)
    return int(operation.weight.count_nonzero()) / operation.weight.numel()
