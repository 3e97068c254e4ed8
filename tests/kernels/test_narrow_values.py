"""Weights in int8, float16 and bfloat16 inside the kernels: the numbers of the widened weights, in every format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP32, NARROW, dense, kept, relative_error, runnable_targets, sparse, terms_of

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    TARGETS,
    ConvolutionGeometry,
    CSRBlocks,
    KeptWeight,
    Pool,
    SparseConvolution,
    SparseLinear,
    SparseProduct,
    Tiling,
    TokenProduct,
    compiled_kernels,
    host_target,
    reference_convolution,
    reference_product,
    reference_weight,
)
from sparsetwin.kernels._tokens import default_format

ACTIVATIONS = (None, "relu", "gelu", "silu")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 150)),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0]),
    value=st.sampled_from(NARROW),
    block=st.none() | st.integers(1, 70),
    extras=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(ACTIVATIONS)),
    seed=st.integers(0, 9),
)
def test_every_shape_density_and_epilogue_equals_the_plain_twin(sizes, density, value, block, extras, seed):
    (rows, length, columns), (scaled, with_bias, with_residual, activation) = sizes, extras
    weight = kept(rows, length, density=density, value=value, seed=seed, scaled=scaled)
    x, bias = dense(length, columns), dense(rows, seed=2) if with_bias else None
    residual = dense(rows, columns, seed=3) if with_residual else None
    expected = reference_product(weight, x, bias=bias, residual=residual, activation=activation)
    terms = terms_of(weight.dense(), x)
    for narrow in (True, False):
        matrix = CSRBlocks.from_kept(weight, block_columns=block, narrow=narrow)
        assert matrix.values.dtype == (weight.values.dtype if narrow else torch.float32)
        product = SparseProduct(matrix, columns=columns, bias=bias, residual=with_residual, activation=activation)
        assert relative_error(product(product.pad(x), residual=residual), expected, terms=terms) <= FP32


@pytest.mark.parametrize("name", ["host", "generic", "4 lanes", "8 lanes", "16 lanes"])
@pytest.mark.parametrize("value", NARROW)
def test_every_width_equals_the_plain_twin(name, value):
    target, x, bias = runnable_targets()[name], dense(50, 77), dense(21)
    weight = kept(21, 50, density=0.3, value=value)
    expected = reference_product(weight, x, bias=bias, activation="relu")
    for vectors in (1, 3, 8):
        tiling = Tiling(vectors=vectors, block=16, narrow=True, target=target)
        product = SparseProduct(weight, columns=77, bias=bias, activation="relu", tiling=tiling)
        assert product.matrix.values.dtype == weight.values.dtype
        assert relative_error(product(product.pad(x)), expected) <= FP32


@pytest.mark.parametrize("value", NARROW)
@pytest.mark.parametrize(("stride", "groups", "block"), [(1, 1, 3), (2, 1, None), (1, 4, None), (1, 8, None)])
def test_convolutions_equal_the_plain_twin(value, stride, groups, block):
    geometry = ConvolutionGeometry(
        in_channels=8, out_channels=16, kernel=(3, 3), height=13, width=10, stride=(stride, stride), padding=(1, 1),
        groups=groups,
    )  # fmt: skip
    weight = kept(16, 8 // groups, 3, 3, density=0.3, value=value)
    x, bias = dense(2, 8, 13, 10), dense(16)
    tiling = Tiling(block=block, narrow=True)
    convolution = SparseConvolution(weight, geometry=geometry, bias=bias, activation="relu", tiling=tiling)
    assert convolution.matrix.values.dtype == weight.values.dtype
    expected = reference_convolution(weight, x, geometry=geometry, bias=bias, activation="relu")
    assert relative_error(convolution.images(x), expected) <= FP32
    assert torch.equal(convolution.images(x, pool=Pool(2)), convolution.images(x))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 90)),
    tokens=st.integers(1, 8),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    value=st.sampled_from(NARROW),
    layout=st.sampled_from(["columns", "bitmask"]),
    extras=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, "silu"])),
)
def test_a_few_tokens_equal_the_plain_twin(sizes, tokens, density, value, layout, extras):
    scaled, with_bias, activation = extras
    weight, x = kept(*sizes, density=density, value=value, scaled=scaled), dense(tokens, sizes[1])
    bias = dense(sizes[0]) if with_bias else None
    matrix = CSRBlocks.from_kept(weight, narrow=True)
    product = TokenProduct(matrix, tokens=tokens, bias=bias, activation=activation, layout=layout)
    expected = reference_product(weight, x.t(), bias=bias, activation=activation).t()
    assert relative_error(product(x), expected) <= FP32


@pytest.mark.parametrize("value", NARROW)
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 130])
def test_a_linear_layer_takes_any_number_of_tokens(value, tokens):
    weight, bias, x = kept(40, 65, density=0.2, value=value), dense(40), dense(tokens, 65)
    linear = SparseLinear(weight, bias=bias, tiling=Tiling(block=20, narrow=True))
    y = linear(x)
    assert y.shape == (tokens, 40)
    if tokens:
        assert relative_error(y, reference_product(weight, x.t(), bias=bias).t()) <= FP32


@pytest.mark.parametrize("target", ["host", "generic"])
@pytest.mark.parametrize("value", ["float16", "bfloat16"])
def test_every_number_of_sixteen_bits_is_widened_exactly(value, target):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, value))
    weight = KeptWeight(shape=(2**16, 1), bits=torch.full((2**13,), 255, dtype=torch.uint8), values=values)
    tiling = Tiling(narrow=True, target=runnable_targets()[target])
    product = SparseProduct(weight, columns=1, tiling=tiling)
    y = product(product.pad(torch.ones(1, 1))).squeeze(1)
    assert torch.equal(y.isnan(), values.isnan())
    assert torch.equal(y.nan_to_num(7.0), values.float().nan_to_num(7.0))


def test_nan_passes_through_kept_zeros_and_not_through_pruned_weights():
    values = torch.tensor([0, 5], dtype=torch.int8)
    weight = KeptWeight(shape=(2, 2), bits=torch.tensor([0b1001], dtype=torch.uint8), values=values)
    product = SparseProduct(weight, columns=1, tiling=Tiling(narrow=True))
    assert product(product.pad(torch.tensor([[float("nan")], [1.0]]))).flatten().isnan().tolist() == [True, False]
    assert product(product.pad(torch.tensor([[1.0], [float("nan")]]))).flatten().isnan().tolist() == [False, True]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    value=st.sampled_from(("float32", *NARROW)),
    block=st.none() | st.integers(1, 50),
)
def test_weights_survive_packing_and_unpacking(rows, columns, density, value, block):
    weight = kept(rows, columns, density=density, value=value)
    numbers, keep = reference_weight(weight)
    assert torch.equal(weight.dense(), numbers.float())
    assert torch.equal(weight.positions(), keep.reshape(-1).nonzero().squeeze(1))
    matrix = CSRBlocks.from_kept(weight, block_columns=block, narrow=True)
    assert relative_error(matrix.to_dense(), numbers) <= 1e-6 or density == 0
    again = matrix.to_kept((rows, columns))
    assert torch.equal(again.values, weight.values if weight.is_narrow else weight.float_values())
    assert torch.equal(again.bits, weight.bits)
    assert relative_error(weight.scaled(torch.full((rows,), 3.0)).dense(), 3 * numbers) <= 1e-6 or density == 0
    whole = matrix.in_one_block()
    assert (whole.blocks, torch.equal(whole.to_dense(), matrix.to_dense())) == (1, True)
    parts = {name: getattr(matrix, name) for name in ("bits", "values", "scales", "block_columns")}
    assert torch.equal(CSRBlocks.from_parts((rows, columns), **parts).row_pointers, matrix.row_pointers)


def test_narrow_values_take_their_few_bytes():
    for value, size in (("int8", 1), ("float16", 2), ("bfloat16", 2), ("float32", 4)):
        matrix = CSRBlocks.from_kept(kept(30, 70, density=0.3, value=value), narrow=True)
        assert matrix.values.nbytes == size * matrix.kept
        assert matrix.bits.nbytes == -(-30 * 70 // 8)


def test_parts_that_do_not_agree_are_refused():
    bits, values = torch.tensor([7], dtype=torch.uint8), torch.zeros(3, dtype=torch.int8)
    KeptWeight(shape=(2, 3), bits=bits, values=values)
    for changed, message in (
        ({"values": values[:2]}, "2 values, but the bits keep 3"),
        ({"values": values.to(torch.int16)}, "int16"),
        ({"bits": bits.to(torch.int8)}, "bytes of bits"),
        ({"shape": (3, 3)}, "has 2 bytes"),
        ({"shape": ()}, "no kernel"),
        ({"shape": (0, 3)}, "no kernel"),
        ({"scales": torch.ones(2)}, "float32"),
        ({"scales": torch.ones(3, dtype=torch.float64)}, "expected one a row"),
    ):
        with pytest.raises(ConfigError, match=message):
            KeptWeight(**({"shape": (2, 3), "bits": bits, "values": values} | changed))
    matrix = CSRBlocks.from_kept(KeptWeight(shape=(2, 3), bits=bits, values=values), narrow=True)
    with pytest.raises(ConfigError, match="not refreshed"):
        matrix.gather_(torch.zeros(2, 3))


def test_the_format_for_a_few_tokens_counts_the_bytes_of_the_values():
    for value in ("int8", "float16"):
        assert default_format(0.2, value=value, target=TARGETS["avx512vbmi2"]) == "bitmask"
        assert default_format(0.02, value=value, target=TARGETS["avx512vbmi2"]) == "columns"
        assert default_format(0.2, value=value, target=TARGETS["avx2"]) == "columns"


def test_plain_float32_weights_need_no_kernel_of_another_kind():
    weight = KeptWeight.from_dense(sparse(5, 9, density=0.5))
    x, tiling = dense(9, 3 * host_target().lanes), Tiling(vectors=3)
    plain = SparseProduct(weight.dense(), columns=x.shape[1], tiling=tiling)
    before = compiled_kernels()
    same = SparseProduct(weight, columns=x.shape[1], tiling=Tiling(vectors=3, narrow=True))
    assert compiled_kernels() == before
    assert torch.equal(same(same.pad(x)), plain(plain.pad(x)))
