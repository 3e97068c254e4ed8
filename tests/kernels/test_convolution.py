"""Convolutions by tap offsets: equal to PyTorch's for every geometry, and layouts that chain."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP32, dense, relative_error, sparse

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    ConvolutionGeometry,
    CSRBlocks,
    SparseConvolution,
    Tiling,
    convolution_limits,
    make_layout,
    reference_convolution,
)

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def same(channels: int, out: int, side: int, kernel: int = 3, stride: int = 1) -> ConvolutionGeometry:
    return ConvolutionGeometry(
        in_channels=channels,
        out_channels=out,
        kernel=(kernel, kernel),
        height=side,
        width=side,
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
    )


@settings(max_examples=120, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    groups=st.sampled_from([1, 2, 4]),
    images=st.sampled_from([1, 3]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_geometry_equals_pytorch(kernel, stride, dilation, padding, size, groups, images, density):
    reach = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    assume(min(reach) >= 1)
    geometry = ConvolutionGeometry(
        in_channels=4,
        out_channels=8,
        kernel=kernel,
        height=size[0],
        width=size[1],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    weight = sparse(8, 4 // groups, *kernel, density=density)
    x, bias, residual = dense(images, 4, *size), dense(8), dense(images, 8, *geometry.out_size, seed=3)
    convolution = SparseConvolution(weight, geometry=geometry, bias=bias, residual=True, activation="relu")
    expected = reference_convolution(weight, x, geometry=geometry, bias=bias, residual=residual, activation="relu")
    assert relative_error(convolution.images(x, residual=residual), expected) <= FP32


def test_depthwise_convolutions_are_groups_of_one_channel():
    geometry = ConvolutionGeometry(
        in_channels=16, out_channels=16, kernel=(3, 3), height=20, width=20, padding=(1, 1), groups=16
    )
    weight, x = sparse(16, 1, 3, 3, density=0.6), dense(2, 16, 20, 20)
    y = SparseConvolution(weight, geometry=geometry).images(x)
    assert relative_error(y, F.conv2d(x.double(), weight.double(), padding=1, groups=16)) <= FP32


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("vectors", [1, 5, 8])
def test_every_tiling_equals_pytorch(block, vectors):
    geometry = same(16, 24, 14)
    weight, x = sparse(24, 16, 3, 3, density=0.2), dense(1, 16, 14, 14)
    convolution = SparseConvolution(weight, geometry=geometry, tiling=Tiling(vectors=vectors, block=block))
    assert relative_error(convolution.images(x), reference_convolution(weight, x, geometry=geometry)) <= FP32


def test_planes_feed_the_next_convolution_without_conversion():
    first, second = same(3, 8, 12), same(8, 5, 12, kernel=5)
    pitch = max(first.least_pitch(), second.least_pitch())
    middle = second.input_layout(pitch)
    weights = sparse(8, 3, 3, 3, density=0.5), sparse(5, 8, 5, 5, density=0.5, seed=1)
    one = SparseConvolution(
        weights[0], geometry=first, source=first.input_layout(pitch), destination=middle, activation="relu"
    )
    two = SparseConvolution(weights[1], geometry=second, source=middle)
    x = dense(2, 3, 12, 12)
    y = two.destination.unpack(two(one(one.source.pack(x))))
    hidden = F.relu(F.conv2d(x.double(), weights[0].double(), padding=1))
    assert relative_error(y, F.conv2d(hidden, weights[1].double(), padding=2)) <= FP32


def test_outputs_are_zero_everywhere_between_the_pixels():
    geometry = same(4, 6, 9)
    convolution = SparseConvolution(sparse(6, 4, 3, 3, density=0.5), geometry=geometry, bias=torch.ones(6))
    planes = convolution(convolution.source.pack(dense(2, 4, 9, 9)))
    pixels = convolution.destination.pack(convolution.destination.unpack(planes))
    assert torch.equal(planes, pixels)


@pytest.mark.parametrize("phases", [(1, 1), (2, 2), (3, 1)])
def test_packing_and_unpacking_are_exact(phases):
    images = dense(2, 3, 7, 10)
    layout = make_layout(channels=3, height=7, width=10, phases=phases, pitch=12, lead=5)
    assert torch.equal(layout.unpack(layout.pack(images)), images)
    assert torch.equal(layout.unpack(layout.pack(images.to(memory_format=torch.channels_last))), images)


def test_nan_stays_at_the_pixels_that_read_it():
    geometry = same(2, 3, 8)
    weight = torch.ones(3, 2, 3, 3)
    weight[0] = 0  # an empty row
    x = dense(1, 2, 8, 8)
    x[0, 1, 0, 7] = float("nan")  # at the border: the next row lies right behind it
    y = SparseConvolution(weight, geometry=geometry).images(x)
    poisoned = y[0].isnan()
    assert not poisoned[0].any()
    assert poisoned[1].nonzero().tolist() == [[0, 6], [0, 7], [1, 6], [1, 7]]


def test_layouts_with_margins_too_small_are_refused():
    geometry = same(4, 4, 8)
    weight = sparse(4, 4, 3, 3, density=0.5)
    bare = make_layout(channels=4, height=8, width=8, pitch=9)
    with pytest.raises(ConfigError, match="margins too small"):
        SparseConvolution(weight, geometry=geometry, source=bare)
    with pytest.raises(ConfigError, match="pitch of 8; expected at least 9"):
        SparseConvolution(weight, geometry=geometry, source=geometry.input_layout(8))
    with pytest.raises(ConfigError, match="output planes"):
        SparseConvolution(weight, geometry=geometry, destination=geometry.output_layout(12))


def test_tensors_that_do_not_fit_are_refused():
    convolution = SparseConvolution(sparse(4, 4, 3, 3, density=0.5), geometry=same(4, 4, 8))
    planes = convolution.source.pack(dense(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="expected contiguous planes"):
        convolution(planes[:, :-1])
    with pytest.raises(ConfigError, match="images have shape"):
        convolution.images(dense(1, 4, 8, 9))
    with pytest.raises(ConfigError, match="residual"):
        convolution(planes, residual=planes)
    one = SparseConvolution(sparse(4, 4, 1, 1, density=0.5), geometry=same(4, 4, 8, kernel=1))
    planes = one.source.pack(dense(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="shares memory"):
        one(planes, out=planes)
    with pytest.raises(ConfigError, match="weight has shape"):
        SparseConvolution(sparse(4, 4, 3, 3, density=0.5), geometry=same(4, 4, 8, kernel=5))
    with pytest.raises(ConfigError, match="the matrix is"):
        SparseConvolution(CSRBlocks.from_dense(torch.ones(4, 4)), geometry=same(4, 4, 8))


def test_geometries_that_cannot_be_are_refused_and_those_too_large_are_handed_back():
    with pytest.raises(ConfigError, match="larger than the padded image"):
        ConvolutionGeometry(in_channels=1, out_channels=1, kernel=(5, 5), height=3, width=3)
    with pytest.raises(ConfigError, match="groups do not divide"):
        ConvolutionGeometry(in_channels=3, out_channels=4, kernel=(1, 1), height=3, width=3, groups=2)
    with pytest.raises(ConfigError, match="must be positive"):
        ConvolutionGeometry(in_channels=3, out_channels=4, kernel=(1, 0), height=3, width=3)
    assert convolution_limits(same(64, 64, 56)) is None
    huge = ConvolutionGeometry(in_channels=512, out_channels=1, kernel=(1, 1), height=2048, width=2048)
    assert "32-bit offsets" in (convolution_limits(huge) or "")
