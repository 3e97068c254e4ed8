"""Sparse kernels for CPUs, generated with llvmlite when they are first needed, each beside its plain reference twin.

`SparseProduct` multiplies a sparse matrix with dense activations, `TokenProduct` with one to eight tokens,
`SparseLinear` chooses between them, `SparseConvolution` convolves, and `DenseConvolution` does so in bfloat16 where too
few weights are pruned. `is_available` tells whether llvmlite is there to make them. Activations and sums are float32
unless a kernel says otherwise; weights are so too, or as a `KeptWeight` holds them in fewer bits.
"""

from sparsetwin.kernels._blocks import CSRBlocks
from sparsetwin.kernels._cache import compiled_kernels, kernel, kernel_ir
from sparsetwin.kernels._convolution import SparseConvolution, convolution_matrix
from sparsetwin.kernels._dense import DenseConvolution, DenseTiles, Panels
from sparsetwin.kernels._dot import Dot, host_dot, tiles_refused
from sparsetwin.kernels._geometry import ConvolutionGeometry, convolution_limits
from sparsetwin.kernels._kept import KeptWeight
from sparsetwin.kernels._launch import Tiling
from sparsetwin.kernels._linear import SparseLinear
from sparsetwin.kernels._llvm import host_features, is_available
from sparsetwin.kernels._planes import PlaneLayout, make_layout
from sparsetwin.kernels._pool import Pool
from sparsetwin.kernels._product import SparseProduct, empty_padded, padded_pitch
from sparsetwin.kernels._reference import reference_convolution, reference_product, reference_weight
from sparsetwin.kernels._specification import Activation, ProductSpecification, lanes_of, max_vectors
from sparsetwin.kernels._target import HALF_TARGETS, TARGETS, Target, checked_target, half_target, host_target
from sparsetwin.kernels._team import Chain, KernelPiece
from sparsetwin.kernels._tokens import TokenProduct
from sparsetwin.kernels._transpose import Transpose
from sparsetwin.kernels._window import PlaneWindow, Window

__all__ = [
    "HALF_TARGETS",
    "TARGETS",
    "Activation",
    "CSRBlocks",
    "Chain",
    "ConvolutionGeometry",
    "DenseConvolution",
    "DenseTiles",
    "Dot",
    "KeptWeight",
    "KernelPiece",
    "Panels",
    "PlaneLayout",
    "PlaneWindow",
    "Pool",
    "ProductSpecification",
    "SparseConvolution",
    "SparseLinear",
    "SparseProduct",
    "Target",
    "Tiling",
    "TokenProduct",
    "Transpose",
    "Window",
    "checked_target",
    "compiled_kernels",
    "convolution_limits",
    "convolution_matrix",
    "empty_padded",
    "half_target",
    "host_dot",
    "host_features",
    "host_target",
    "is_available",
    "kernel",
    "kernel_ir",
    "lanes_of",
    "make_layout",
    "max_vectors",
    "padded_pitch",
    "reference_convolution",
    "reference_product",
    "reference_weight",
    "tiles_refused",
]
