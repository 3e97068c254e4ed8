"""Dense bfloat16 kernels on planes: emulated they equal the reference, and the real code has the right instructions."""

import platform
import re
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP32, dense, relative_error

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    ConvolutionGeometry,
    DenseConvolution,
    DenseTiles,
    Panels,
    Pool,
    SparseConvolution,
    Tiling,
    host_dot,
    host_features,
    kernel_ir,
    make_layout,
    reference_convolution,
    reference_product,
    tiles_refused,
)
from sparsetwin.kernels._dense_ir import DenseSpecification
from sparsetwin.kernels._dot import _asked, dot_target, emulated_dot, why_not
from sparsetwin.kernels._llvm import assemble

BF16 = 1e-2  # relative to float32 operands
DOTS = ("amx", "avx512bf16")
pairs = st.tuples(st.integers(1, 2), st.integers(1, 2))


@pytest.fixture(params=DOTS)
def dot(request):
    with emulated_dot(request.param) as found:
        yield found


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def same(channels: int, out: int, side: int, kernel: int = 3, groups: int = 1) -> ConvolutionGeometry:
    return ConvolutionGeometry(
        in_channels=channels,
        out_channels=out,
        kernel=(kernel, kernel),
        height=side,
        width=side,
        padding=(kernel // 2, kernel // 2),
        groups=groups,
    )


def check(geometry: ConvolutionGeometry, *, images: int = 1, tiling: Tiling | None = None, activation=None) -> None:
    """Compare with the reference on rounded operands, and on float32 ones."""
    weight = dense(geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel, seed=0)
    x = dense(images, geometry.in_channels, geometry.height, geometry.width)
    bias, residual = dense(geometry.out_channels), dense(images, geometry.out_channels, *geometry.out_size, seed=3)
    convolution = DenseConvolution(
        weight, geometry=geometry, bias=bias, residual=True, activation=activation, tiling=tiling
    )
    y = convolution.images(x, residual=residual)
    rest = {"geometry": geometry, "bias": bias, "residual": residual, "activation": activation}
    assert relative_error(y, reference_convolution(rounded(weight), rounded(x), **rest)) <= FP32
    assert relative_error(y, reference_convolution(weight, x, **rest)) <= BF16


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(DOTS),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    groups=st.sampled_from([1, 2]),
    channels=st.tuples(st.sampled_from([2, 6, 34]), st.sampled_from([2, 34, 70])),
    images=st.sampled_from([1, 3]),
)
def test_every_geometry_equals_the_reference(name, kernel, stride, dilation, padding, size, groups, channels, images):
    reach = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    assume(min(reach) >= 1)
    geometry = ConvolutionGeometry(
        in_channels=channels[0],
        out_channels=channels[1],
        kernel=kernel,
        height=size[0],
        width=size[1],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    with emulated_dot(name):
        check(geometry, images=images, activation="relu")


@pytest.mark.parametrize("out", [1, 15, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 65])
def test_every_tail_of_rows_and_sums_equals_the_reference(dot, out, channels):
    check(same(channels, out, 5, kernel=1), activation="relu")


@pytest.mark.parametrize("block", [None, 4, 11])
@pytest.mark.parametrize("vectors", [None, 1, 3, 4])
def test_every_tiling_equals_the_reference(dot, block, vectors):
    check(same(24, 40, 12), tiling=Tiling(block=block, vectors=vectors), activation="relu")


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_every_activation_equals_the_reference(dot, activation):
    check(same(8, 9, 7), activation=activation)


def test_tokens_are_images_one_row_high(dot):
    geometry = ConvolutionGeometry(in_channels=70, out_channels=50, kernel=(1, 1), height=1, width=45)
    weight, x = dense(50, 70, seed=0), dense(70, 45)
    y = DenseConvolution(weight.view(50, 70, 1, 1), geometry=geometry).images(x.view(1, 70, 1, 45))
    assert relative_error(y.view(50, 45), reference_product(rounded(weight), rounded(x))) <= FP32


def test_sums_longer_than_a_block_are_put_together(dot):
    check(same(130, 34, 6), activation="relu")  # 1170 products: two blocks by default


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize(("groups", "side"), [(1, 16), (1, 8), (4, 8)])
def test_every_number_of_threads_gives_the_same_bits(dot, threads, groups, side):
    geometry = same(64, 68, side, groups=groups)
    x = dense(2, 64, side, side)
    convolution = DenseConvolution(dense(68, 64 // groups, 3, 3, seed=0), geometry=geometry, activation="relu")
    planes = convolution.source.pack(x[:1])
    out, panels = convolution.destination.empty(1), Panels(convolution.panel_bytes)
    pieces = convolution.bound(planes, out=out, panels=panels, threads=threads)
    assert len(pieces) > 1
    assert torch.equal(convolution(planes, pool=Pool(threads)), convolution(planes))
    assert torch.equal(convolution.images(x, pool=Pool(threads)), convolution.images(x))


def test_planes_go_from_sparse_to_dense_kernels_without_conversion(dot):
    first, second = same(4, 20, 10), same(20, 6, 10)
    weights, x = (dense(20, 4, 3, 3, seed=0), dense(6, 20, 3, 3, seed=2)), dense(2, 4, 10, 10)
    one = SparseConvolution(weights[0], geometry=first, destination=second.input_layout(), activation="relu")
    two = DenseConvolution(weights[1], geometry=second, source=one.destination)
    planes = one(one.source.pack(x))
    expected = reference_convolution(rounded(weights[1]), rounded(one.destination.unpack(planes)), geometry=second)
    assert relative_error(two.destination.unpack(two(planes)), expected) <= FP32


def test_outputs_are_zero_everywhere_between_the_pixels(dot):
    convolution = DenseConvolution(dense(6, 4, 3, 3), geometry=same(4, 6, 9), bias=torch.ones(6), activation="silu")
    planes = convolution(convolution.source.pack(dense(2, 4, 9, 9)))
    assert torch.equal(planes, convolution.destination.pack(convolution.destination.unpack(planes)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_reach_the_pixels_that_read_them_and_no_others(dot, number):
    geometry = same(3, 18, 8)  # 27 products: the tile is filled up with zeros
    weight, x = dense(18, 3, 3, 3, seed=0), dense(1, 3, 8, 8)
    x[0, 2, 0, 7] = number  # at the border: the next row lies right behind it
    y = DenseConvolution(weight, geometry=geometry).images(x)
    expected = reference_convolution(weight, x, geometry=geometry)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert (y[y.isinf()] == expected[expected.isinf()]).all()


def test_operands_are_rounded_to_the_nearest_even_number(dot):
    values = torch.cat([torch.linspace(-3, 3, 61), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-130, 3e38])])
    geometry = ConvolutionGeometry(in_channels=1, out_channels=1, kernel=(1, 1), height=1, width=len(values))
    y = DenseConvolution(torch.ones(1, 1, 1, 1), geometry=geometry).images(values.view(1, 1, 1, -1)).view(-1)
    expected = rounded(values)
    expected[values == 2.0**-130] = 0  # a subnormal operand reads as zero
    assert torch.equal(y, expected)


def test_the_same_weight_in_tiles_makes_the_same_convolution(dot):
    geometry, weight, x = same(10, 20, 6, groups=2), dense(20, 5, 3, 3, seed=0), dense(1, 10, 6, 6)
    tiles = DenseTiles.from_dense(weight, groups=2, dot=dot)
    assert tiles.tiles.dtype == torch.bfloat16
    made = DenseConvolution(tiles, geometry=geometry)
    assert made.weight is tiles
    assert torch.equal(made.images(x), DenseConvolution(weight, geometry=geometry).images(x))


def test_what_does_not_fit_is_refused(dot):
    geometry = same(4, 4, 8)
    weight = dense(4, 4, 3, 3)
    with pytest.raises(ConfigError, match="the weight has shape"):
        DenseConvolution(weight[:3], geometry=geometry)
    with pytest.raises(ConfigError, match="expected those of a weight"):
        DenseConvolution(DenseTiles.from_dense(weight[:2], dot=dot), geometry=geometry)
    with pytest.raises(ConfigError, match="the bias has shape"):
        DenseConvolution(weight, geometry=geometry, bias=torch.ones(3))
    bare = make_layout(channels=4, height=8, width=8, pitch=9)
    with pytest.raises(ConfigError, match="margins too small"):
        DenseConvolution(weight, geometry=geometry, source=bare)
    for tiling in (Tiling(vectors=0), Tiling(block=0), Tiling(vectors=-3)):
        with pytest.raises(ConfigError, match="expected at least 1 each"):
            DenseConvolution(weight, geometry=geometry, tiling=tiling)
    with pytest.raises(ConfigError, match="have no kernel"):
        DenseConvolution(weight, geometry=geometry, source=geometry.input_layout(dtype=torch.bfloat16))
    convolution = DenseConvolution(weight, geometry=geometry)
    planes = convolution.source.pack(dense(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="residual=given"):
        convolution(planes, residual=convolution.destination.empty(1))
    with pytest.raises(ConfigError, match="shares memory"):
        convolution(planes, out=planes[:, : convolution.destination.elements])
    with pytest.raises(ConfigError, match="bytes a part"):
        convolution.bound(planes, out=convolution.destination.empty(1), panels=Panels(64))


# the real code, which need not run here

X86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="reads x86 assembly")


def real_code(name: str) -> str:
    found = dot_target(name)
    spec = DenseSpecification(dot=found, bias=True, residual=True, activation="relu")
    return assemble(kernel_ir(spec), features=found.target.feature_string)


@X86
def test_code_for_amx_multiplies_by_tiles_and_spills_none():
    text = real_code("amx")
    blocks = 4 + 2 + 2 + 1  # tiles of sums: two by two, and what sticks out at the right, below, in the corner
    count = {name: len(re.findall(rf"\t{name}\t?", text)) for name in ("tdpbf16ps", "tilezero", "tilestored")}
    assert count == dict.fromkeys(count, blocks)
    operands = 4 + 3 + 3 + 2  # tiles of weights and activations
    assert len(re.findall(r"\ttileloadd\t", text)) == operands + blocks  # and sums that waited for this block
    assert len(re.findall(r"\tldtilecfg\t", text)) == len(re.findall(r"\ttilerelease\n", text)) == 1
    assert "call" not in text
    assert "%zmm" in text


@X86
def test_the_inner_loop_for_amx_loads_each_tile_once_for_two_products():
    text = real_code("amx")
    loops = [part for part in re.split(r"\n\.LBB\w+:", text) if part.count("tdpbf16ps") == 4]
    assert len(loops) == 1
    order = re.findall(r"\t(tileloadd|tdpbf16ps)\t.*?((?:%tmm\d(?:, )?)+)$", loops[0], flags=re.MULTILINE)
    assert [name for name, _ in order].count("tileloadd") == 4
    assert re.findall(r"tdpbf16ps\t(%tmm\d), (%tmm\d), (%tmm\d)", loops[0]) == [
        ("%tmm6", "%tmm4", "%tmm0"),
        ("%tmm7", "%tmm4", "%tmm1"),
        ("%tmm6", "%tmm5", "%tmm2"),
        ("%tmm7", "%tmm5", "%tmm3"),
    ]


@X86
def test_code_for_vectors_keeps_sixteen_sums_in_registers():
    text = real_code("avx512bf16")
    loops = [part for part in re.split(r"\n\.LBB\w+:", text) if "vdpbf16ps" in part]
    assert len(loops) == 1
    found = re.findall(r"vdpbf16ps\t-?\d*\(%\w+\)\{1to16\}, %zmm\d+, (%zmm\d+)", loops[0])
    assert len(found) == len(set(found)) == 16  # weights straight from memory
    assert "(%rsp)" not in loops[0]  # nothing spilled
    assert "vcvtneps2bf16" in text
    assert "call" not in text


def test_without_an_instruction_there_is_none_and_a_reason():
    missing = {name: why_not(name) for name in DOTS}
    found = host_dot()
    if found is None:
        assert all(missing.values())
        with pytest.raises(ConfigError, match="cannot use"):
            DenseConvolution(dense(4, 4, 3, 3), geometry=same(4, 4, 8))
    else:
        assert missing[found.name] is None
        assert not found.emulated
        check(same(24, 40, 12), activation="relu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
@X86
def test_a_processor_without_tiles_is_refused_them_by_linux_with_a_reason():
    if host_features().get("amx-tile", False):
        pytest.skip("this one has tiles")
    assert (_asked() or "").startswith("Linux does not let this process use AMX: ")
    assert tiles_refused() is None  # nothing to tell: there are none


def test_an_emulation_ends_with_its_block():
    before = host_dot()
    with emulated_dot("amx"), emulated_dot("avx512bf16") as inner:
        assert host_dot() is inner
    assert host_dot() == before
    with pytest.raises(ConfigError, match="unknown instruction"), emulated_dot("mmx"):
        pass
