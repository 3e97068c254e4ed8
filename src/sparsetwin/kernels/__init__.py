"""Sparse kernels for CPUs, generated with llvmlite when they are first needed, each beside its plain reference twin.

`SparseProduct` multiplies a sparse matrix with dense activations, `TokenProduct` with one to eight tokens,
`SparseLinear` chooses between them, `SparseConvolution` convolves. `is_available` tells whether llvmlite is there to
make them. float32 activations and sums; weights in float32, or as a `KeptWeight` holds them in fewer bits.
"""

from sparsetwin.kernels._blocks import CSRBlocks
from sparsetwin.kernels._cache import compiled_kernels, kernel, kernel_ir
from sparsetwin.kernels._convolution import SparseConvolution
from sparsetwin.kernels._geometry import ConvolutionGeometry, convolution_limits
from sparsetwin.kernels._kept import KeptWeight
from sparsetwin.kernels._launch import Tiling
from sparsetwin.kernels._linear import SparseLinear
from sparsetwin.kernels._llvm import host_features, is_available
from sparsetwin.kernels._planes import PlaneLayout, make_layout
from sparsetwin.kernels._pool import Pool
from sparsetwin.kernels._product import SparseProduct, empty_padded, padded_pitch
from sparsetwin.kernels._reference import reference_convolution, reference_product, reference_weight
from sparsetwin.kernels._specification import Activation, ProductSpecification, max_vectors
from sparsetwin.kernels._target import TARGETS, Target, checked_target, host_target
from sparsetwin.kernels._team import Chain, KernelPiece
from sparsetwin.kernels._tokens import TokenProduct
from sparsetwin.kernels._transpose import Transpose
from sparsetwin.kernels._window import PlaneWindow, Window

__all__ = [
    "TARGETS",
    "Activation",
    "CSRBlocks",
    "Chain",
    "ConvolutionGeometry",
    "KeptWeight",
    "KernelPiece",
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
    "empty_padded",
    "host_features",
    "host_target",
    "is_available",
    "kernel",
    "kernel_ir",
    "make_layout",
    "max_vectors",
    "padded_pitch",
    "reference_convolution",
    "reference_product",
    "reference_weight",
]
