"""Sparse matrix times dense columns: equal to the plain twin, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP32, dense, relative_error, runnable_targets, sparse, terms_of

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import (
    CSRBlocks,
    SparseProduct,
    Tiling,
    empty_padded,
    padded_pitch,
    reference_product,
)

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 60), st.integers(1, 150)),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0]),
    block=st.none() | st.integers(1, 70),
    extras=st.tuples(st.booleans(), st.booleans(), st.sampled_from(ACTIVATIONS)),
    seed=st.integers(0, 9),
)
def test_every_shape_density_and_epilogue_equals_the_plain_twin(sizes, density, block, extras, seed):
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
    )
    y = product(product.pad(x), residual=residual)
    expected = reference_product(weight, x, bias=bias, residual=residual, activation=activation)
    assert relative_error(y, expected, terms=terms_of(weight, x)) <= FP32


@pytest.mark.parametrize("name", ["host", "generic", "4 lanes", "8 lanes", "16 lanes"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_width_equals_the_plain_twin(name, activation):
    target = runnable_targets()[name]
    weight, x, bias, residual = sparse(21, 50, density=0.3), dense(50, 77), dense(21), dense(21, 77, seed=4)
    for vectors in (1, 3, 8):
        tiling = Tiling(vectors=vectors, block=16, target=target)
        product = SparseProduct(weight, columns=77, bias=bias, residual=True, activation=activation, tiling=tiling)
        y = product(product.pad(x), residual=residual)
        expected = reference_product(weight, x, bias=bias, residual=residual, activation=activation)
        assert relative_error(y, expected) <= FP32


@pytest.mark.parametrize("vectors", range(1, 13))
def test_every_tile_width_equals_the_plain_twin(vectors):
    weight, x = sparse(9, 33, density=0.5), dense(33, 210)
    product = SparseProduct(weight, columns=210, tiling=Tiling(vectors=vectors, target="generic"))
    assert relative_error(product(product.pad(x)), reference_product(weight, x)) <= FP32


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_exact_to_float32_from_far_below_zero_to_far_above(activation):
    x = torch.linspace(-100, 100, 20001).reshape(1, -1)
    product = SparseProduct(torch.ones(1, 1), columns=x.shape[1], activation=activation)
    y = product(product.pad(x))
    expected = reference_product(torch.ones(1, 1), x, activation=activation)
    assert torch.allclose(y.double(), expected, rtol=2e-6, atol=1e-6)


def test_nan_and_infinity_pass_through_kept_weights_and_not_through_pruned_ones():
    weight = sparse(24, 64, density=0.2)
    for poison in (float("nan"), float("inf")):
        x = dense(64, 40)
        x[5, 7] = poison
        for block in (64, 10):
            product = SparseProduct(CSRBlocks.from_dense(weight, block_columns=block), columns=40, activation="relu")
            y, expected = product(product.pad(x)), reference_product(weight, x, activation="relu")
            assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
            assert bool(y[weight[:, 5] == 0].isfinite().all())  # a dense product would give NaN here


def test_a_kept_weight_of_zero_passes_nan_on():
    keep = torch.tensor([[True, False]])
    matrix = CSRBlocks.from_dense(torch.zeros(1, 2), keep=keep)
    product = SparseProduct(matrix, columns=1)
    assert product(product.pad(torch.tensor([[float("nan")], [1.0]]))).isnan().item()
    assert product(product.pad(torch.tensor([[1.0], [float("nan")]]))).item() == 0.0


def test_nothing_is_written_beside_the_columns_and_rows_of_the_output():
    for columns in (1, 7, 8, 9, 65, 130):
        surroundings = torch.full((7, columns + 20), float("nan"))
        out = surroundings[1:6, 4 : 4 + columns]
        product = SparseProduct(sparse(5, 12, density=0.5), columns=columns)
        product(product.pad(dense(12, columns)), out=out)
        assert bool(out.isfinite().all())
        assert int(surroundings.isnan().sum()) == surroundings.numel() - out.numel()


def test_refreshed_values_are_used_by_the_next_call():
    weight, x = sparse(8, 16, density=0.5), dense(16, 5)
    product = SparseProduct(weight, columns=5)
    before = product(product.pad(x))
    product.matrix.gather_(weight * 2)
    assert torch.equal(product(product.pad(x)), before * 2)


def test_a_chain_of_products_needs_no_copy_between_them():
    first, second, x = sparse(20, 30, density=0.4), sparse(10, 20, density=0.4, seed=5), dense(30, 50)
    one, two = SparseProduct(first, columns=50), SparseProduct(second, columns=50)
    y = two(one(one.pad(x), out=empty_padded(20, 50)))
    assert relative_error(y, second.double() @ (first.double() @ x.double())) <= FP32


def test_the_pitch_is_an_odd_number_of_cache_lines():
    assert all(padded_pitch(columns) // 16 % 2 == 1 and padded_pitch(columns) >= columns for columns in range(1, 300))


def test_inputs_of_another_layout_shape_or_dtype_are_refused_by_name():
    product = SparseProduct(sparse(4, 6, density=0.5), columns=10)
    x = product.pad(dense(6, 10))
    with pytest.raises(ConfigError, match="row pitch of 10"):
        product(dense(6, 10))
    with pytest.raises(ConfigError, match="strides"):
        product(dense(10, 6).t())
    with pytest.raises(ConfigError, match=r"x has shape \(6, 9\)"):
        product(x[:, :9])
    with pytest.raises(ConfigError, match="float64"):
        product(x.double())
    with pytest.raises(ConfigError, match="shares memory"):
        product(x, out=x[:4])
    with pytest.raises(ConfigError, match="residual"):
        product(x, residual=dense(4, 10))
    with pytest.raises(ConfigError, match="out has shape"):
        product(x, out=torch.empty(4, 11))


def test_what_no_kernel_can_be_is_refused_by_name():
    weight = sparse(4, 6, density=0.5)
    with pytest.raises(ConfigError, match="did you mean 'gelu'"):
        SparseProduct(weight, columns=4, activation="gellu")
    with pytest.raises(ConfigError, match="bias has shape"):
        SparseProduct(weight, columns=4, bias=torch.zeros(5))
    with pytest.raises(ConfigError, match="pitch of 3"):
        SparseProduct(weight, columns=4, pitch=3)
    with pytest.raises(ConfigError, match="do not fit"):
        SparseProduct(weight, columns=4000, tiling=Tiling(vectors=100))
    with pytest.raises(ConfigError, match="columns=0"):
        SparseProduct(weight, columns=0)
    with pytest.raises(ConfigError, match="out of reach"):
        SparseProduct(sparse(2, 600, density=1.0), columns=8, pitch=1_000_000)
