"""Rows without a pruned weight are worked on several at a time: the same bits as row by row, on every target."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP32, NARROW, dense, kept, relative_error, runnable_targets

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    ConvolutionGeometry,
    CSRBlocks,
    Pool,
    ProductSpecification,
    SparseConvolution,
    SparseProduct,
    Tiling,
    host_target,
)


def together(kernel) -> int:
    """How many rows the kernel of whole tiles works on at a time."""
    return kernel._product.full.specification.together


@pytest.mark.parametrize("target", runnable_targets().values(), ids=runnable_targets())
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("rows", [5, 13])
def test_rows_together_give_the_bits_of_each_row_by_itself(rows, vectors, target):
    columns = 2 * vectors * target.lanes + 3
    weight, x, bias = dense(rows, 19), dense(19, columns, seed=2), dense(rows, seed=3)
    residual = dense(rows, columns, seed=4)
    tiling = Tiling(vectors=vectors, block=8, target=target)

    def product(part):
        one = SparseProduct(weight[part], columns=columns, bias=bias[part], residual=True, tiling=tiling)
        return one, one(one.pad(x), residual=residual[part])

    made, y = product(slice(None))
    assert together(made) > 1
    singles = torch.cat([product(slice(row, row + 1))[1] for row in range(rows)])
    assert torch.equal(y, singles)
    expected = weight.double() @ x.double() + bias.double().unsqueeze(1) + residual
    assert relative_error(y, expected) <= FP32


@pytest.mark.parametrize("value", NARROW)
def test_narrow_values_are_widened_for_rows_together(value):
    weight = kept(10, 24, density=2.0, value=value)
    x = dense(24, 70)
    product = SparseProduct(weight, columns=70, tiling=Tiling(vectors=2, narrow=True))
    assert together(product) > 1
    expected = CSRBlocks.from_kept(weight).to_dense().double() @ x.double()
    assert relative_error(product(product.pad(x)), expected) <= FP32


@pytest.mark.parametrize("stride", [1, 2])
def test_a_dense_convolution_takes_rows_together_by_default_on_any_threads(stride):
    geometry = ConvolutionGeometry(
        in_channels=3, out_channels=22, kernel=(7, 7), height=30, width=41, stride=(stride, stride), padding=(3, 3)
    )
    weight, bias, x = dense(22, 3, 7, 7), dense(22, seed=5), dense(3, 3, 30, 41, seed=6)
    convolution = SparseConvolution(weight, geometry=geometry, bias=bias, activation="relu")
    assert together(convolution) > 1
    y = convolution.images(x)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, 3).relu()
    assert relative_error(y, expected) <= FP32
    pool = Pool(3)
    assert torch.equal(convolution.images(x, pool=pool), y)
    pool.close()


def test_rows_that_read_different_channels_or_have_pruned_weights_stay_apart():
    grouped = ConvolutionGeometry(in_channels=8, out_channels=8, kernel=(3, 3), height=9, width=40, groups=4)
    one = replace(grouped, groups=1)
    pruned = dense(8, 8, 3, 3)
    pruned[2, 1, 0, 0] = 0
    for geometry, weight in ((grouped, dense(8, 2, 3, 3)), (one, pruned)):
        convolution = SparseConvolution(weight, geometry=geometry, tiling=Tiling(vectors=2))
        assert together(convolution) == 1
        x = dense(2, 8, 9, 40)
        expected = F.conv2d(x.double(), weight.double(), groups=geometry.groups)
        assert relative_error(convolution.images(x), expected) <= FP32


def test_more_rows_than_fit_the_registers_are_refused():
    spec = ProductSpecification(target=replace(host_target(), registers=16), lanes=4, vectors=3, together=4)
    with pytest.raises(ConfigError, match="rows"):
        replace(spec, together=5)
    with pytest.raises(ConfigError, match="rows"):
        replace(spec, vectors=1, chains=2)
