"""The machine code for AVX-512 and AVX512-FP16, run by an interpreter: right also where no processor has them."""

import ctypes
import platform
from dataclasses import replace

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from avx512_interpreter import Interpreter, UnknownInstructionError
from kernel_cases import FP16, FP32, dense, half_targets, relative_error, sparse

from sparsetwin.kernels import (
    HALF_TARGETS,
    TARGETS,
    ConvolutionGeometry,
    CSRBlocks,
    PlaneWindow,
    SparseConvolution,
    SparseProduct,
    Target,
    Tiling,
    Window,
    kernel_ir,
    make_layout,
    reference_convolution,
    reference_product,
)
from sparsetwin.kernels._launch import Addresses
from sparsetwin.kernels._llvm import assemble
from sparsetwin.kernels._team import KernelPiece

HALF = torch.float16
TARGET = {HALF: HALF_TARGETS["avx512fp16"], torch.float32: TARGETS["avx512"]}
MOST = {HALF: FP16, torch.float32: FP32}
pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not half_targets(), reason="reads x86 assembly"
)


def as_wide() -> Target:
    """A target that runs here and cuts work as AVX-512 does: 16 float32 numbers a vector, 32 registers."""
    return replace(half_targets()["emulated"], lanes=16)


def interpret(pieces: list[KernelPiece], target: Target, *memory: torch.Tensor) -> set[str]:
    """Run pieces as a target would on memory that they may touch; return the instructions that ran."""
    ran: set[str] = set()
    for piece in pieces:
        text = assemble(kernel_ir(replace(piece.kernel.specification, target=target)), features=target.feature_string)
        interpreter = Interpreter(text)
        interpreter.allow(ctypes.addressof(piece.table), ctypes.sizeof(piece.table))
        for tensor in memory:
            storage = tensor.untyped_storage()
            interpreter.allow(storage.data_ptr(), storage.nbytes())
        try:
            interpreter.run(ctypes.addressof(piece.table), *piece.ranges)
        except UnknownInstructionError as error:
            pytest.skip(f"this LLVM writes another instruction: {error}")
        ran |= interpreter.ran
    return ran


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(
    ("density", "block", "vectors", "activation"),
    [
        (0.1, None, 2, "relu"),
        (0.6, 30, 1, "gelu"),
        (0.6, 100, 4, "silu"),
        (1.0, 33, 2, "relu"),
        (1.0, None, 1, "gelu_tanh"),
        (0.0, None, 3, None),
    ],
)
def test_products_are_as_the_plain_twin_says(density, block, vectors, activation, dtype):
    weight, x, bias, residual = sparse(7, 80, density=density), dense(80, 75), dense(7), dense(7, 75, seed=4)
    product = SparseProduct(
        CSRBlocks.from_dense(weight, block_columns=block),
        columns=75,
        bias=bias,
        residual=True,
        activation=activation,
        tiling=Tiling(vectors=vectors, target=as_wide()),
        dtype=dtype,
    )
    across, added, out = product.pad(x), residual.to(dtype), torch.full((7, 75), float("nan"), dtype=dtype)
    at = Addresses(
        input=across.data_ptr(),
        output=out.data_ptr(),
        output_pitch=out.itemsize * out.stride(0),
        residual=added.data_ptr(),
        residual_pitch=out.itemsize * added.stride(0),
    )
    tiled = product._product
    matrix = tiled.matrix
    read = (across, added, out, bias, matrix.row_pointers, matrix.values, tiled.indices)
    ran = interpret(tiled.pieces(at, threads=1), TARGET[dtype], *read)
    if dtype == HALF:
        assert (density == 0) == (not ran & {"vfmadd231ph", "vfmadd213ph"})
    expected = reference_product(weight, x, bias=bias, residual=residual, activation=activation)
    assert relative_error(out, expected) <= MOST[dtype]
    assert relative_error(out, product(across, residual=added).double()) <= MOST[dtype]


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_convolutions_are_as_pytorch_says_and_zero_between_the_pixels(dtype):
    geometry = ConvolutionGeometry(in_channels=6, out_channels=9, kernel=(3, 3), height=7, width=9, padding=(1, 1))
    weight, x, bias = sparse(9, 6, 3, 3, density=0.8), dense(1, 6, 7, 9), dense(9)
    convolution = SparseConvolution(
        weight,
        geometry=geometry,
        bias=bias,
        activation="relu",
        source=geometry.input_layout(dtype=dtype),
        tiling=Tiling(block=3, target=as_wide()),
    )
    planes, out = convolution.source.pack(x), convolution.destination.empty(1)
    tiled = convolution._product
    matrix = tiled.matrix
    read = (planes, out, bias, convolution._keep, matrix.row_pointers, matrix.values, tiled.indices)
    interpret(convolution.bound(planes, out=out), TARGET[dtype], *read)
    found = convolution.destination.unpack(out)
    expected = reference_convolution(weight, x, geometry=geometry, bias=bias, activation="relu")
    assert relative_error(found, expected) <= MOST[dtype]
    assert torch.equal(out, convolution.destination.pack(found))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 60000.0])
@pytest.mark.parametrize("kept", [4, 90])
def test_nan_infinity_and_overflow_are_not_hidden_by_relu(poison, kept):
    weight = torch.full((2, kept), -2.0)
    weight[1] = 1e-3
    x = torch.ones(kept, 32)
    x[:4, 5] = poison
    product = SparseProduct(weight, columns=32, activation="relu", tiling=Tiling(target=as_wide()), dtype=HALF)
    across, out = product.pad(x), torch.zeros(2, 32, dtype=HALF)
    at = Addresses(input=across.data_ptr(), output=out.data_ptr(), output_pitch=64)
    tiled = product._product
    read = (across, out, tiled.matrix.row_pointers, tiled.matrix.values, tiled.indices)
    interpret(tiled.pieces(at, threads=1), TARGET[HALF], *read)
    assert not bool(out[0, 5].isfinite())
    assert bool(out[1, 5].isfinite()) == (poison == 60000.0)
    out[:, 5] = 0
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (2, 2)), ((2, 3), (1, 1)), ((1, 1), (2, 2))])
def test_pooling_and_phases_are_exact(kernel, stride, dtype):
    x = dense(1, 2, 9, 73).relu().to(dtype).float()
    window = Window(kernel=kernel, stride=stride, padding=(kernel[0] // 2, kernel[1] // 2))
    pitch = window.least_pitch(73)
    body = window.body(9, 73, pitch, dtype)
    source = make_layout(channels=2, height=9, width=73, pitch=pitch, lead=window.lead(pitch), body=body, dtype=dtype)
    rows, columns = window.out_size(9, 73)
    destination = make_layout(channels=2, height=rows, width=columns, pitch=columns + 1, dtype=dtype)
    planes, out = source.pack(x), destination.empty(1)
    pieces = PlaneWindow(window, source=source, destination=destination, target=as_wide()).bound(planes, out=out)
    interpret(pieces, TARGETS["avx512"], planes, out)
    expected = torch.nn.functional.max_pool2d(x, kernel, stride, window.padding)
    assert torch.equal(destination.unpack(out), expected)
