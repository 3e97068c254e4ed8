"""One to eight tokens, and linear layers of any number: equal to the plain twin in each format."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from kernel_cases import FP32, dense, relative_error, runnable_targets, sparse

from sparsetwin.errors import ConfigError
from sparsetwin.kernels import TARGETS, CSRBlocks, SparseLinear, TokenProduct, reference_product
from sparsetwin.kernels._tokens import default_format


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 90)),
    tokens=st.integers(1, 8),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    value=st.sampled_from(["float32", "bfloat16"]),
    layout=st.sampled_from(["columns", "bitmask"]),
    activation=st.sampled_from([None, "silu"]),
)
def test_every_format_equals_the_plain_twin(sizes, tokens, density, value, layout, activation):
    weight, x, bias = sparse(*sizes, density=density), dense(tokens, sizes[1]), dense(sizes[0])
    product = TokenProduct(weight, tokens=tokens, bias=bias, activation=activation, value=value, layout=layout)
    stored = weight if value == "float32" else weight.bfloat16().float()  # sums are exact to float32 in either format
    expected = reference_product(stored, x.t(), keep=weight != 0, bias=bias, activation=activation).t()
    assert relative_error(product(x), expected) <= FP32


@pytest.mark.parametrize("name", ["generic", "4 lanes", "8 lanes", "16 lanes"])
@pytest.mark.parametrize("layout", ["columns", "bitmask"])
def test_every_width_equals_the_plain_twin(name, layout):
    weight = sparse(13, 70, density=0.3)
    for tokens in (1, 2, 5, 8):
        x = dense(tokens, 70)
        product = TokenProduct(weight, tokens=tokens, layout=layout, target=runnable_targets()[name])
        assert relative_error(product(x), reference_product(weight, x.t()).t()) <= FP32


@pytest.mark.parametrize("layout", ["columns", "bitmask"])
def test_nan_passes_through_kept_weights_and_not_through_pruned_ones(layout):
    weight, x = sparse(20, 50, density=0.3), dense(3, 50)
    x[1, 17] = float("nan")
    y = TokenProduct(weight, tokens=3, layout=layout)(x)
    assert torch.equal(y.isnan(), torch.outer(torch.tensor([False, True, False]), weight[:, 17] != 0))


@pytest.mark.parametrize("value", ["float32", "bfloat16"])
def test_what_lies_behind_a_row_does_not_reach_it(value):
    weight, x = torch.zeros(4, 40), dense(1, 40).abs()
    weight[0, 3] = 2.0
    weight[1, 5:16] = float("inf")  # read with row 0, and thrown away
    weight[2, 20] = 1.0
    x[0, 20:] = float("nan")  # picked with row 1's last values
    y = TokenProduct(weight, tokens=1, value=value, layout="columns")(x)
    assert y[0, 0] == 2 * x[0, 3]
    assert y[0, 1] == float("inf")
    assert y[0, 2].isnan()
    assert y[0, 3] == 0


@pytest.mark.parametrize("layout", ["columns", "bitmask"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_calls_may_run_at_once(layout, tokens):
    product = TokenProduct(sparse(300, 200, density=0.2), tokens=tokens, layout=layout)
    inputs = [dense(tokens, 200, seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(product, inputs))
    assert all(torch.equal(y, product(x)) for x, y in zip(inputs, found, strict=True))


def test_a_result_has_no_graph():
    linear = SparseLinear(sparse(12, 20, density=0.5))
    for tokens in (1, 3, 30):
        x = dense(tokens, 20).requires_grad_()
        y = linear(x, residual=dense(tokens, 12).requires_grad_())
        assert not y.requires_grad
        assert not linear(x).requires_grad
        assert torch.equal(linear(x), linear(x.detach()))


def test_the_format_with_fewer_bytes_is_chosen_where_the_target_unpacks_masks():
    choose = {name: [default_format(d, value="float32", target=t) for d in (0.02, 0.2)] for name, t in TARGETS.items()}
    assert choose["avx512"] == ["columns", "bitmask"]
    assert choose["avx2"] == choose["neon"] == choose["generic"] == ["columns", "columns"]


def test_what_does_not_fit_is_refused_by_name():
    weight = sparse(4, 6, density=0.5)
    with pytest.raises(ConfigError, match="tokens=9"):
        TokenProduct(weight, tokens=9)
    with pytest.raises(ConfigError, match="layout='rows'"):
        TokenProduct(weight, tokens=1, layout="rows")
    with pytest.raises(ConfigError, match="value='int8'"):
        TokenProduct(weight, tokens=1, value="int8")  # int8 takes scales: a `KeptWeight` has them
    with pytest.raises(ConfigError, match="2 blocks"):
        TokenProduct(CSRBlocks.from_dense(weight, block_columns=3), tokens=1)
    with pytest.raises(ConfigError, match="beyond 16 bits"):
        TokenProduct(torch.ones(1, 65537), tokens=1, layout="columns")
    with pytest.raises(ConfigError, match="expected contiguous"):
        TokenProduct(weight, tokens=2)(dense(6, 2).t())
    with pytest.raises(ConfigError, match="bias has shape"):
        TokenProduct(weight, tokens=2, bias=torch.zeros(3))


@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 9, 31, 128, 129, 300])
def test_a_linear_layer_takes_any_number_of_tokens(tokens):
    weight, bias = sparse(40, 65, density=0.2), dense(40)
    linear = SparseLinear(weight, bias=bias, activation="gelu")
    for x in (dense(tokens, 65), dense(65, tokens).t()):
        y = linear(x)
        assert y.shape == (tokens, 40)
        assert y.is_contiguous()
        if tokens:
            expected = reference_product(weight, x.t(), bias=bias, activation="gelu").t()
            assert relative_error(y, expected) <= FP32


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_linear_layer_keeps_leading_axes_and_adds_a_residual(activation):
    weight = sparse(12, 20, density=0.5)
    linear = SparseLinear(weight, chunk=16, activation=activation)
    for shape in ((20,), (3, 20), (2, 5, 20), (4, 7, 20)):
        x, residual = dense(*shape), dense(*shape[:-1], 12, seed=5)
        added = residual.clone()
        y = linear(x, residual=residual)
        expected = x.double() @ weight.double().t() + residual.double()
        assert relative_error(y, expected.relu() if activation else expected) <= FP32
        assert torch.equal(residual, added)


@pytest.mark.parametrize(("activation", "has_own"), [(None, True), ("relu", False)])
def test_few_tokens_with_a_residual_have_their_kernel_unless_an_activation_follows(activation, has_own):
    weight = sparse(30, 40, density=0.3)
    linear, product = SparseLinear(weight, activation=activation), TokenProduct(weight, tokens=2)
    x, residual = dense(2, 40), dense(12, 30)[::6]
    y = linear(x, residual=residual)
    assert torch.equal(y, product(x) + residual) or not has_own
    assert bool(linear._token_products) == has_own


def test_what_one_call_leaves_in_the_workspace_does_not_reach_the_next():
    linear = SparseLinear(sparse(5, 9, density=0.5), chunk=16)
    x = dense(12, 9)
    expected = linear(x)
    linear(torch.full((16, 9), float("nan")))
    assert torch.equal(linear(x), expected)


def test_a_linear_layer_refuses_what_does_not_fit():
    linear = SparseLinear(sparse(5, 9, density=0.5))
    with pytest.raises(ConfigError, match=r"expected \(..., 9\)"):
        linear(dense(3, 8))
    with pytest.raises(ConfigError, match="residual has shape"):
        linear(dense(3, 9), residual=dense(3, 4))
    with pytest.raises(ConfigError, match="bfloat16"):
        linear(dense(3, 9).bfloat16())
    with pytest.raises(ConfigError, match=r"expected \(M, K\)"):
        SparseLinear(dense(3))
