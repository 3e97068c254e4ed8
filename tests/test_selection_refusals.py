"""No layer is left empty, and what cannot be selected from is refused by name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selection_cases import DTYPES, assert_same, by_magnitude, by_value, kept, reference, select, shapes_of
from sparsetwin.distributions import Budget, Global, Uniform
from sparsetwin.errors import SelectionError
from sparsetwin.selection import select_masks
from sparsetwin.targets import Targets

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_global_ranking_empties_the_middle_of_an_mlp_and_the_floor_prevents_it(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    weights = Targets().resolve(model)  # uniform in +-1/sqrt(inputs), so those of the middle layer are the smallest
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    (budget,) = Global().budgets(shapes_of(weights), 0.9)
    threshold = magnitudes.kthvalue(magnitudes.numel() - budget.kept + 1).values
    plainly = {name: int((weight.abs() >= threshold).sum()) for name, weight in weights.items()}
    assert plainly["2.weight"] == 0 < min(plainly["0.weight"], plainly["4.weight"])
    assert kept(select(weights, Global(), 0.9, minimum_kept=0)) == plainly
    guarded = select(weights, Global(), 0.9)
    assert sum(kept(guarded).values()) == budget.kept
    assert kept(guarded)["2.weight"] == 1
    assert int(guarded["2.weight"].flatten().nonzero()) == int(weights["2.weight"].abs().argmax())
    assert kept(select(weights, Global(), 0.9, minimum_kept=70))["2.weight"] == 70


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(1, 8), st.integers(0, 2**32 - 1), st.data())
def test_every_layer_keeps_its_floor_however_small_its_weights(counts, minimum_kept, seed, data):
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{i}": torch.randn(n, generator=generator) * 10.0**-i for i, n in enumerate(counts)}
    floors = {name: min(minimum_kept, weight.numel()) for name, weight in weights.items()}
    budget = Budget(tuple(weights), data.draw(st.integers(sum(floors.values()), sum(counts))))
    masks = select_masks(weights, by_magnitude(weights), [budget], minimum_kept=minimum_kept)
    assert sum(kept(masks).values()) == budget.kept
    assert all(kept(masks)[name] >= floors[name] for name in weights)


def test_each_layer_keeps_exactly_one_weight_where_the_budget_is_the_number_of_layers():
    weights = {f"{index}": torch.randn(5, 4) * 10.0**-index for index in range(6)}
    masks = select_masks(weights, by_magnitude(weights), [Budget(tuple(weights), 6)])
    assert set(kept(masks).values()) == {1}
    for name, mask in masks.items():
        assert int(mask.flatten().nonzero()) == int(weights[name].abs().argmax())


def test_a_budget_of_fewer_weights_than_layers_is_refused():
    weights = {"a": torch.randn(10, 10), "b": torch.randn(10, 10), "c": torch.randn(10, 10)}
    with pytest.raises(SelectionError, match="2 of 300 weights are too few for 3 layers: each layer keeps at least 1"):
        select(weights, Global(), 1 - 2 / 300)
    assert kept(select(weights, Uniform(), 0.999)) == {"a": 1, "b": 1, "c": 1}


def test_sparsity_zero_keeps_everything_and_no_budget_keeps_nothing():
    weights = {"a": torch.randn(3, 4), "b": torch.zeros(2)}
    assert kept(select(weights, Global(), 0.0)) == {"a": 12, "b": 2}
    nothing = select_masks(weights, by_magnitude(weights), [Budget(("a", "b"), 0)], minimum_kept=0)
    assert kept(nothing) == {"a": 0, "b": 0}
    assert [mask.shape for mask in nothing.values()] == [(3, 4), (2,)]


def test_a_layer_without_elements_gets_an_empty_mask():
    weights = {"a": torch.randn(0, 4), "b": torch.randn(5), "c": torch.tensor(3.0)}
    masks = select(weights, Global(), 0.5)
    assert_same(masks, reference(weights, Global(), 0.5))
    assert masks["a"].shape == (0, 4)
    assert masks["c"].shape == ()


def test_a_layer_in_no_budget_gets_no_mask_and_masks_are_in_the_order_of_the_weights():
    weights = {"a": torch.randn(3), "b": torch.randn(3), "c": torch.randn(3)}
    masks = select_masks(weights, by_magnitude(weights), [Budget(("c",), 1), Budget(("a",), 2)])
    assert list(masks) == ["a", "c"]
    assert select_masks(weights, by_magnitude(weights), []) == {}
    assert select_masks(weights, by_magnitude(weights), [Budget((), 0)]) == {}


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [0, -1])
@pytest.mark.parametrize("payload", ["lowest", "quiet", "all"])
def test_nan_scores_of_any_bits_are_refused_by_the_name_of_their_parameter(payload, sign, dtype, sparsity):
    info = torch.iinfo(BITS[dtype])
    infinity = int(torch.tensor(torch.inf, dtype=dtype).view(BITS[dtype]))
    positive = {
        "lowest": infinity + 1,
        "quiet": int(torch.tensor(torch.nan, dtype=dtype).view(BITS[dtype])),
        "all": info.max,
    }
    bits = positive[payload] + (info.min if sign else 0)
    bad = torch.randn(9, 7).to(dtype)
    bad.view(BITS[dtype])[4, 2] = bits
    bad.view(BITS[dtype])[8, 6] = bits
    assert int(bad.isnan().sum()) == 2
    weights = {"fine.weight": torch.randn(5, 5).to(dtype), "broken.weight": bad}
    for distribution in (Global(), Uniform()):
        with pytest.raises(SelectionError, match=r"2 of the 63 scores of broken\.weight are NaN"):
            select(weights, distribution, sparsity, score=by_value)


def test_scores_of_another_shape_or_kind_are_refused_by_name():
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    budgets = [Budget(("a", "b"), 5)]
    with pytest.raises(SelectionError, match=r"the scores of a have shape \(3, 2\), its weight \(2, 3\)"):
        select_masks(weights, lambda name: weights[name].T if name == "a" else weights[name], budgets)
    with pytest.raises(
        SelectionError, match=r"the scores of b have dtype torch\.int64; expected a float of 16, 32 or 64"
    ):
        select_masks(weights, lambda name: weights[name].long() if name == "b" else weights[name], budgets)


def test_budgets_that_name_a_layer_twice_or_an_unknown_one_are_refused():
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    with pytest.raises(SelectionError, match="a budget names c, which is not among the weights"):
        select_masks(weights, by_magnitude(weights), [Budget(("a", "c"), 3)])
    with pytest.raises(SelectionError, match="a is in two budgets, or twice in one"):
        select_masks(weights, by_magnitude(weights), [Budget(("a",), 3), Budget(("b", "a"), 3)])
    with pytest.raises(SelectionError, match="cannot keep 11 of 10 weights"):
        select_masks(weights, by_magnitude(weights), [Budget(("a", "b"), 11)])
