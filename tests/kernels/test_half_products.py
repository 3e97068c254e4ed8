"""Products and convolutions with float16 arithmetic: near the plain twin, and the machine code that they are made for.

Where the machine has no such arithmetic the same IR runs in float32, rounded after each operation.
"""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP16, dense, half_targets, relative_error, sparse, terms_of

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    HALF_TARGETS,
    ConvolutionGeometry,
    CSRBlocks,
    DenseConvolution,
    PlaneWindow,
    Pool,
    ProductSpecification,
    SparseConvolution,
    SparseProduct,
    Tiling,
    Transpose,
    Window,
    kernel_ir,
    make_layout,
    reference_convolution,
    reference_product,
)
from sparsetwin.kernels._dot import emulated_dot
from sparsetwin.kernels._llvm import assemble

HALF = torch.float16
NAMES = sorted(half_targets())
pytestmark = pytest.mark.skipif(not NAMES, reason="float16 would be turned into float32 by library calls here")


def tiling(**choices: int) -> Tiling:
    return Tiling(target=half_targets()["emulated"], **choices)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(1, 150)),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0]),
    block=st.none() | st.integers(1, 70),
    extras=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, "relu", "gelu", "silu"])),
    seed=st.integers(0, 9),
)
def test_every_shape_density_and_epilogue_is_near_the_plain_twin(sizes, density, block, extras, seed):
    (rows, length, columns), (with_bias, with_residual, activation) = sizes, extras
    weight, x = sparse(rows, length, density=density, seed=seed), dense(length, columns)
    bias = dense(rows, seed=2) if with_bias else None
    residual = dense(rows, columns, seed=3) if with_residual else None
    product = SparseProduct(
        CSRBlocks.from_dense(weight, block_columns=block),
        columns=columns,
        bias=bias,
        residual=with_residual,
        activation=activation,
        tiling=tiling(),
        dtype=HALF,
    )
    y = product(product.pad(x), residual=None if residual is None else residual.half())
    assert y.dtype == HALF
    expected = reference_product(weight, x, bias=bias, residual=residual, activation=activation)
    terms = terms_of(weight, x) + sum(0.1 * float(t.abs().max()) for t in (bias, residual) if t is not None)
    assert relative_error(y, expected, terms=terms) <= FP16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vectors", [1, 3, 7, 14])
@pytest.mark.parametrize(("density", "block"), [(0.03, 400), (0.3, 400), (0.3, 64), (1.0, 100)])
def test_every_tile_and_block_is_near_the_plain_twin(name, vectors, density, block):
    weight, x, bias = sparse(150, 400, density=density), dense(400, 333), dense(150)
    cut = Tiling(vectors=vectors, block=block, target=half_targets()[name])
    product = SparseProduct(weight, columns=333, bias=bias, activation="relu", tiling=cut, dtype=HALF)
    expected = reference_product(weight, x, bias=bias, activation="relu")
    assert relative_error(product(product.pad(x)), expected) <= FP16


@pytest.mark.parametrize("length", [4608, 20000])
def test_long_rows_are_as_exact_as_short_ones(length):
    weight, x = sparse(12, length, density=0.2), dense(length, 64)
    product = SparseProduct(weight, columns=64, tiling=tiling(vectors=2), dtype=HALF)
    assert relative_error(product(product.pad(x)), reference_product(weight, x)) <= FP16


def test_sums_that_only_pass_through_large_numbers_are_right_in_float32():
    weight = torch.ones(1, 128)
    weight[:, 64:] = -1
    x = torch.full((128, 32), 1500.0)  # 64 of them are beyond what float16 holds
    product = SparseProduct(weight, columns=32, tiling=tiling(), dtype=HALF)
    assert bool((product(product.pad(x)) == 0).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("kept", [4, 200])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_what_overflows_float16_is_never_a_finite_result(sign, kept, activation):
    weight = torch.full((2, kept), sign * 200.0)
    weight[1] = 1.0
    x = torch.full((kept, 40), 300.0)
    product = SparseProduct(weight, columns=40, activation=activation, tiling=tiling(), dtype=HALF)
    y = product(product.pad(x))
    assert not bool(y[0].isfinite().any())
    assert bool(y[1].isfinite().all())


def test_nan_and_infinity_pass_through_kept_weights_and_not_through_pruned_ones():
    weight = sparse(24, 64, density=0.2)
    for poison in (float("nan"), float("inf"), float("-inf")):
        x = dense(64, 40)
        x[5, 7] = poison
        for block in (64, 10):
            matrix = CSRBlocks.from_dense(weight, block_columns=block)
            product = SparseProduct(matrix, columns=40, activation="relu", tiling=tiling(), dtype=HALF)
            y = product(product.pad(x))
            reads = weight[:, 5] != 0
            assert not bool(y[reads, 7].isfinite().any())
            assert bool(y[~reads].isfinite().all())
            y[:, 7] = 0
            assert bool(y.isfinite().all())


def test_nothing_is_written_beside_the_columns_and_rows_of_the_output():
    for columns in (1, 15, 16, 33, 130):
        surroundings = torch.full((7, columns + 20), float("nan"), dtype=HALF)
        out = surroundings[1:6, 4 : 4 + columns]
        product = SparseProduct(sparse(5, 60, density=0.9), columns=columns, tiling=tiling(), dtype=HALF)
        product(product.pad(dense(60, columns)), out=out)
        assert bool(out.isfinite().all())
        assert int(surroundings.isnan().sum()) == surroundings.numel() - out.numel()


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    groups=st.sampled_from([1, 2, 4]),
    images=st.sampled_from([1, 3]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_geometry_is_near_pytorch(kernel, stride, padding, size, groups, images, density):
    assume(min(n + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel, strict=True)) >= 1)
    geometry = ConvolutionGeometry(
        in_channels=4,
        out_channels=8,
        kernel=kernel,
        height=size[0],
        width=size[1],
        stride=stride,
        padding=padding,
        groups=groups,
    )
    weight, x, bias = sparse(8, 4 // groups, *kernel, density=density), dense(images, 4, *size), dense(8)
    residual = dense(images, 8, *geometry.out_size, seed=3)
    convolution = SparseConvolution(
        weight,
        geometry=geometry,
        bias=bias,
        residual=True,
        activation="relu",
        source=geometry.input_layout(dtype=HALF),
        tiling=tiling(),
    )
    expected = reference_convolution(weight, x, geometry=geometry, bias=bias, residual=residual, activation="relu")
    assert relative_error(convolution.images(x, residual=residual), expected, terms=0.3) <= FP16
    planes = convolution(convolution.source.pack(x), residual=convolution.destination.pack(residual))
    pixels = convolution.destination.pack(convolution.destination.unpack(planes))
    assert torch.equal(planes, pixels)  # zero between them


def test_threads_change_no_bit_and_many_rows_take_turns_on_the_stack():
    geometry = ConvolutionGeometry(in_channels=40, out_channels=330, kernel=(3, 3), height=14, width=14, padding=(1, 1))
    weight, x = sparse(330, 40, 3, 3, density=0.4), dense(2, 40, 14, 14)
    convolution = SparseConvolution(
        weight, geometry=geometry, source=geometry.input_layout(dtype=HALF), tiling=tiling(vectors=4, block=10)
    )
    alone = convolution.images(x)
    assert relative_error(alone, reference_convolution(weight, x, geometry=geometry)) <= FP16
    assert torch.equal(convolution.images(x, pool=Pool(3)), alone)
    assert torch.equal(convolution.images(x[:1], pool=Pool(2)), alone[:1])


@pytest.mark.parametrize("name", ["amx", "avx512bf16"])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "activation"), [(3, 1, 1, "relu"), (1, 1, 1, "gelu"), (3, 2, 2, None)]
)
def test_dense_kernels_read_and_write_planes_of_float16(name, kernel, stride, groups, activation):
    geometry = ConvolutionGeometry(
        in_channels=34,
        out_channels=40,
        kernel=(kernel, kernel),
        height=13,
        width=11,
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
    )
    weight, x, bias = dense(40, 34 // groups, kernel, kernel), dense(3, 34, 13, 11), dense(40)
    residual = dense(3, 40, *geometry.out_size, seed=3)
    with emulated_dot(name):
        convolution = DenseConvolution(
            weight,
            geometry=geometry,
            bias=bias,
            residual=True,
            activation=activation,
            source=geometry.input_layout(dtype=HALF),
        )
    source, added = convolution.source.pack(x), convolution.destination.pack(residual)
    planes = convolution(source, residual=added)
    found = convolution.destination.unpack(planes)
    assert torch.equal(planes, convolution.destination.pack(found))  # zero between the pixels
    assert torch.equal(convolution(source, residual=added, pool=Pool(2)), planes)
    expected = reference_convolution(
        weight.bfloat16().float(),
        x.half().bfloat16().float(),
        geometry=geometry,
        bias=bias,
        residual=residual.half().float(),
        activation=activation,
    )
    assert relative_error(found, expected) <= 6e-4  # rounded once to float16
    source[:, convolution.source.lead] = float("-inf")
    assert not bool(convolution.destination.unpack(convolution(source, residual=added))[:, :, 0, 0].isfinite().all())


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 1), (0, 1))])
def test_pooling_and_phases_are_exact(kernel, stride, padding):
    x = dense(2, 3, 21, 37).relu().half().float()
    window = Window(kernel=kernel, stride=stride, padding=padding)
    pitch = window.least_pitch(37)
    lead, body = window.lead(pitch), window.body(21, 37, pitch, HALF)
    source = make_layout(channels=3, height=21, width=37, pitch=pitch, lead=lead, body=body, dtype=HALF)
    rows, columns = window.out_size(21, 37)
    out = make_layout(channels=3, height=rows, width=columns, pitch=columns + 1, dtype=HALF)
    found = out.unpack(PlaneWindow(window, source=source, destination=out)(source.pack(x)))
    assert torch.equal(found, torch.nn.functional.max_pool2d(x, kernel, stride, padding))
    copy = Window(stride=(2, 2))
    halves = make_layout(channels=3, height=11, width=19, pitch=20, dtype=HALF)
    wide = make_layout(channels=3, height=21, width=37, pitch=40, body=copy.body(21, 37, 40, HALF), dtype=HALF)
    found = halves.unpack(PlaneWindow(copy, source=wide, destination=halves)(wide.pack(x)))
    assert torch.equal(found, x[:, :, ::2, ::2])


@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (40, 33), (128, 64)])
def test_transposing_rounds_to_float16_and_back_exactly(shape):
    x = dense(*shape)
    down, up = Transpose(destination=HALF), Transpose(source=HALF)
    across = down(x, out=torch.empty(shape[1], shape[0], dtype=HALF))
    assert torch.equal(across, x.t().half())
    assert torch.equal(up(across, out=torch.empty(shape)), x.half().float())


def test_float16_takes_a_target_that_computes_with_it_and_tensors_of_that_dtype():
    with pytest.raises(ConfigError, match="generic has no float16 arithmetic"):
        SparseProduct(torch.ones(2, 2), columns=4, tiling=Tiling(target="generic"), dtype=HALF)
    with pytest.raises(ConfigError, match="bfloat16 have no kernel"):
        SparseProduct(torch.ones(2, 2), columns=4, dtype=torch.bfloat16)
    product = SparseProduct(torch.ones(2, 2), columns=4, tiling=tiling(), dtype=HALF)
    with pytest.raises(ConfigError, match=r"x is torch\.float32"):
        product(torch.ones(2, 4))
    geometry = ConvolutionGeometry(in_channels=1, out_channels=1, kernel=(1, 1), height=4, width=4)
    with pytest.raises(ConfigError, match="output planes"):
        SparseConvolution(
            torch.ones(1, 1, 1, 1),
            geometry=geometry,
            source=geometry.input_layout(dtype=HALF),
            destination=geometry.output_layout(),
            tiling=tiling(),
        )


@pytest.mark.parametrize("accumulator", ["float16", "float32"])
@pytest.mark.parametrize(("vectors", "chains"), [(1, 4), (4, 2), (7, 2), (12, 1)])
def test_the_inner_loop_on_avx512fp16_is_multiply_adds_of_whole_registers_only(accumulator, vectors, chains):
    target = HALF_TARGETS["avx512fp16"]
    spec = ProductSpecification(
        target=target, lanes=32, vectors=vectors, chains=chains, element="float16", value="float16",
        accumulator=accumulator, run=16 * chains, bias=True, residual=True, activation="relu", keep=True,
    )  # fmt: skip
    text = _assembled(kernel_ir(spec), "x86_64-unknown-linux-gnu", spec)
    assert "call" not in text
    blocks = re.split(r"^\S*:.*$", text, flags=re.MULTILINE)
    inner = [block for block in blocks if block.count("vfmadd231ph") >= 4 * vectors]
    (loop,) = inner
    assert len(re.findall(r"vfmadd231ph\t\d*\(%r\w+,%r\w+\), %zmm\d+, %zmm\d+", loop)) == 4 * vectors
    assert len(re.findall(r"vpbroadcastw\t\d*\(.*\), %zmm", loop)) == 4  # a weight in all lanes
    assert not re.search(r"vcvt|vmov[au]p|%ymm|%xmm", loop)


def test_the_inner_loop_on_neon_is_multiply_adds_of_float16():
    target = HALF_TARGETS["neonfp16"]
    spec = ProductSpecification(
        target=target, lanes=8, vectors=4, chains=2, element="float16", value="float16", bias=True
    )
    text = _assembled(kernel_ir(spec), "aarch64-unknown-linux-gnu", spec)
    assert len(re.findall(r"fmla\tv\d+\.8h", text)) == 20
    assert "\tbl\t" not in text


def _assembled(ir: str, triple: str, spec: ProductSpecification) -> str:
    try:
        return assemble(ir, features=spec.target.feature_string, triple=triple)
    except ConfigError as error:
        pytest.skip(str(error))
