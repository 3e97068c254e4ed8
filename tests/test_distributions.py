"""Kept weights: ``N - round(s * N)`` of a group, and budgets that cannot be met are refused."""

import dataclasses
import math
import pickle
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetwin.distributions import DISTRIBUTIONS, ERK, Budget, Global, PerLayer, Uniform, check_budgets
from sparsetwin.errors import ConfigError, SelectionError, TargetError
from sparsetwin.metrics import count_forward_flops
from sparsetwin.models import resnet50
from sparsetwin.targets import Targets

RESNET50 = 25_502_912  # weights of its 54 layers
SIZES = {"a": 315, "b": 2368, "c": 11}
GLOBAL_KEPT = {0.5: 1347, 0.8: 539, 0.9: 269, 0.95: 135, 0.98: 54, 0.999: 3}
UNIFORM_KEPT = {
    0.5: (157, 1184, 5),  # halves round to the even number of pruned weights: 158 of 315, 6 of 11
    0.8: (63, 474, 2),
    0.9: (31, 237, 1),
    0.95: (16, 118, 1),
    0.98: (6, 47, 1),
    0.999: (1, 2, 1),
}
SPARSITIES = tuple(GLOBAL_KEPT)

sizes = st.lists(st.integers(1, 10**8), min_size=1, max_size=6).map(
    lambda given: {f"layer{index}": size for index, size in enumerate(given)}
)
sparsities = st.floats(0, 1, exclude_max=True)


def vectors(sizes):
    return {name: (size,) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.5, 12_751_456), (0.8, 5_100_582), (0.9, 2_550_291), (0.95, 1_275_146), (0.98, 510_058)]
)
def test_resnet50_keeps_the_published_numbers_of_weights_rounded_instead_of_floored(sparsity, kept):
    assert Global().budgets({"resnet50": (RESNET50,)}, sparsity) == (Budget(("resnet50",), kept),)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_is_one_budget_over_all_layers(sparsity):
    assert Global().budgets(vectors(SIZES), sparsity) == (Budget(("a", "b", "c"), GLOBAL_KEPT[sparsity]),)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uniform_is_a_budget_for_each_layer_of_at_least_one_weight(sparsity):
    expected = tuple(Budget((name,), count) for name, count in zip(SIZES, UNIFORM_KEPT[sparsity], strict=True))
    assert Uniform().budgets(vectors(SIZES), sparsity) == expected


@given(sizes, sparsities)
def test_a_budget_is_within_half_a_weight_of_what_was_asked(sizes, sparsity):
    (budget,) = Global().budgets(vectors(sizes), sparsity)
    total = sum(sizes.values())
    rounding = Fraction(total) / 2**52  # of the product s * N as a float
    assert abs(budget.kept - (total - Fraction(sparsity) * total)) <= Fraction(1, 2) + rounding
    assert budget.names == tuple(sizes)
    for budget, (name, size) in zip(Uniform().budgets(vectors(sizes), sparsity), sizes.items(), strict=True):
        assert budget.names == (name,)
        wanted = size - Fraction(sparsity) * size
        assert abs(budget.kept - wanted) <= Fraction(1, 2) + rounding or (budget.kept == 1 and wanted < 1)
        assert 1 <= budget.kept <= size


@given(sizes)
def test_sparsity_zero_keeps_everything(sizes):
    assert Global().budgets(vectors(sizes), 0.0)[0].kept == sum(sizes.values())
    assert sum(budget.kept for budget in Uniform().budgets(vectors(sizes), 0.0)) == sum(sizes.values())


@pytest.mark.parametrize(
    ("budget", "minimum_kept", "message"),
    [
        (Budget(("a", "b"), 1), 1, "1 of 10 weights are too few for 2 layers: each layer keeps at least 1, 2 in all"),
        (Budget(("a", "b"), 5), 3, "5 of 10 weights are too few for 2 layers: each layer keeps at least 3, 6 in all"),
        (Budget(("a",), 2), 3, "2 of 6 weights are too few for a: each layer keeps at least 3, 3 in all"),
        (Budget(("a", "b"), 11), 1, "cannot keep 11 of 10 weights; a sparsity is at least 0"),
        (Budget(("a", "b"), 5), -1, "minimum_kept needs to be at least 0, got -1"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budget, minimum_kept, message):
    with pytest.raises(SelectionError, match=re.escape(message)):
        check_budgets((budget,), {"a": 6, "b": 4}, minimum_kept=minimum_kept)


def test_a_layer_smaller_than_the_minimum_needs_no_more_than_it_has():
    check_budgets((Budget(("a", "b"), 9),), {"a": 6, "b": 4}, minimum_kept=5)
    with pytest.raises(SelectionError, match="9 in all"):
        check_budgets((Budget(("a", "b"), 8),), {"a": 6, "b": 4}, minimum_kept=5)


RAGGED = {"stem": (8, 3, 3, 3), "body": (16, 8, 3, 3), "wide": (64, 48, 1, 1), "head": (10, 64), "scale": (5,)}
shape_maps = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda given: {f"layer{index}": shape for index, shape in enumerate(given)}
)


def kept(budgets):
    assert all(len(budget.names) == 1 for budget in budgets)
    return {budget.names[0]: budget.kept for budget in budgets}


def densities_by_bisection(shapes, total):
    """Return what each layer would keep if it could keep fractions: min(1, epsilon * sum / product) of its size."""

    def wanted(epsilon):
        return {name: min(math.prod(shape), epsilon * sum(shape)) for name, shape in shapes.items()}

    low, high = 0.0, float(max(math.prod(shape) for shape in shapes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(middle).values()) < total else (low, middle)
    return wanted(high)


@settings(deadline=None)
@given(shape_maps, sparsities)
def test_erk_keeps_what_bisection_on_its_formula_finds_to_less_than_a_weight(shapes, sparsity):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    if total < len(shapes):
        with pytest.raises(SelectionError, match=f"{total} of {sum(sizes.values())} weights are too few"):
            ERK().budgets(shapes, sparsity)
        return
    found = kept(ERK().budgets(shapes, sparsity))
    assert list(found) == list(shapes)
    assert sum(found.values()) == total
    wanted = densities_by_bisection(shapes, total)
    lifted = sum(max(0.0, 1 - count) for count in wanted.values())  # to one weight, which others give
    for name, size in sizes.items():
        assert 1 <= found[name] <= size
        assert abs(found[name] - max(1, wanted[name])) < 1 + lifted + 1e-6


def test_erk_shares_by_dimensions_and_keeps_dense_what_would_exceed_its_weights():
    # sums 16 and 10 of dimensions share 24 weights: 14.77 and 9.23; the larger remainder gets the one that is left
    assert kept(ERK().budgets({"wide": (8, 8), "narrow": (8, 2)}, 0.7)) == {"wide": 15, "narrow": 9}
    # 48 weights are 29.5 and 18.5, more than the 16 that narrow has: it is dense and wide has the other 32
    assert kept(ERK().budgets({"wide": (8, 8), "narrow": (8, 2)}, 0.4)) == {"wide": 32, "narrow": 16}
    # a kernel's sides count as dimensions: 8 + 4 + 3 + 3 = 18 against 8 + 4 = 12, sharing 32 of 320
    assert kept(ERK().budgets({"conv": (8, 4, 3, 3), "fc": (8, 4)}, 0.9)) == {"conv": 19, "fc": 13}
    # 33 by sums 3, 5 and 20 would be 3.5, 5.9 and 23.6; once a is dense, 31 by 5 and 20 are 6.2 of b's 6 and 24.8
    assert kept(ERK().budgets({"a": (2, 1), "b": (3, 2), "c": (16, 4)}, 39 / 72)) == {"a": 2, "b": 6, "c": 25}


def test_erk_gives_what_is_left_of_equal_remainders_to_the_earlier_layer():
    assert kept(ERK().budgets({"a": (4, 4), "b": (4, 4), "c": (4, 4)}, 1 - 7 / 48)) == {"a": 3, "b": 2, "c": 2}


def test_erk_lifts_a_layer_to_one_weight_and_takes_it_from_another():
    # 3 of 65 weights by sums of 20 and 1 would be 2.86 and 0.14
    assert kept(ERK().budgets({"a": (16, 4), "b": (1,)}, 1 - 3 / 65)) == {"a": 2, "b": 1}


@pytest.mark.parametrize(("sparsity", "share_of_flops"), [(0.8, 0.42), (0.9, 0.24)])
def test_erk_costs_a_resnet50_the_published_share_of_its_flops(sparsity, share_of_flops):
    """As the published code of Evci et al., 2020, lists them in its README for inference: 0.42 and 0.24 of dense."""
    with torch.device("meta"):
        model = resnet50()
        forward = count_forward_flops(model, torch.zeros(1, 3, 224, 224))
    shapes = {name: weight.shape for name, weight in Targets().resolve(model).items()}
    found = kept(ERK().budgets(shapes, sparsity))
    assert sum(found.values()) == RESNET50 - round(sparsity * RESNET50)
    assert forward.total(found) / forward.total() == pytest.approx(share_of_flops, abs=0.006)
    free = {n: found[n] / math.prod(shape) for n, shape in shapes.items() if found[n] < math.prod(shape)}
    scale = [free[name] * math.prod(shapes[name]) / sum(shapes[name]) for name in free]
    assert max(scale) / min(scale) == pytest.approx(1, abs=0.01)  # proportional to sum / product wherever not dense


def test_per_layer_keeps_exactly_the_maps_numbers_at_its_own_overall_sparsity():
    layers = PerLayer({"stem": 0.0, "body": 0.75, "re:wi.*": 0.9375, "head": 0.5, "scale": 0.4})
    overall = layers.overall_sparsity(RAGGED)
    assert overall == pytest.approx((864 + 2880 + 320 + 2) / 5085)
    expected = {"stem": 216, "body": 288, "wide": 192, "head": 320, "scale": 3}
    assert kept(layers.budgets(RAGGED, overall)) == expected
    assert kept(layers.budgets(RAGGED, round(overall, 12))) == expected


def test_per_layer_scales_sparsities_linearly_to_another_overall_one():
    layers = PerLayer({"a": 0.8, "b": 0.4})
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert layers.overall_sparsity(shapes) == 0.6
    assert kept(layers.budgets(shapes, 0.3)) == {"a": 60, "b": 80}
    assert kept(layers.budgets(shapes, 0.0)) == {"a": 100, "b": 100}
    assert kept(layers.budgets(shapes, 0.7)) == {"a": 7, "b": 53}  # 6.67 and 53.33; the larger remainder rounds up
    with pytest.raises(SelectionError, match=r"a would have a sparsity of 1: its 0\.8 is scaled .* of 0\.6 to 0\.75"):
        layers.budgets(shapes, 0.75)
    with pytest.raises(SelectionError, match=r"every layer of the map is dense"):
        PerLayer({"*": 0.0}).budgets(shapes, 0.5)


def test_per_layer_rounds_what_ties_on_paper_in_favour_of_the_earlier_layer():
    # 0.5, 2.5 and 1.5 of 5 weights: as floats 5 * (1 - 0.9) is a little less than a half
    layers = PerLayer({"a": 0.9, "b": 0.5, "c": 0.7})
    shapes = {"b": (5,), "a": (5,), "c": (5,)}
    assert kept(layers.budgets(shapes, 0.7)) == {"b": 3, "a": 1, "c": 1}  # 15 - round(10.5) = 5 in all; a is lifted


@settings(deadline=None)
@given(shape_maps, st.lists(st.floats(0, 0.99), min_size=6, max_size=6), sparsities)
def test_per_layer_totals_are_exact_and_layers_within_a_weight_of_their_share(shapes, drawn, sparsity):
    layers = PerLayer(dict(zip(shapes, drawn, strict=False)))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    overall = sum(sizes[name] * own for name, own in layers.sparsities) / sum(sizes.values())
    try:
        found = kept(layers.budgets(shapes, sparsity))
    except SelectionError as error:
        text = str(error)
        assert "too few" in text or "would have a sparsity of" in text or ("is dense" in text and overall == 0)
        return
    total = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    assert sum(found.values()) == total
    scale = sparsity / overall if overall else 1.0
    wanted = {name: sizes[name] * (1 - own * scale) for name, own in layers.sparsities}
    lifted = sum(max(0.0, 1 - count) for count in wanted.values())
    for name, count in found.items():
        assert 1 <= count <= sizes[name]
        assert abs(count - max(1, wanted[name])) < 1.5 + lifted + 1e-5


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [
        ({"stem": 0.5, "boby": 0.5, "*": 0.5}, "'boby' matches none of the layers; did you mean 'body'?"),
        ({"stem": 0.5, "body": 0.5}, "head.weight matches no key of the map; expected exactly one"),
        ({"*": 0.5, "body": 0.9}, "body.weight matches '*' and 'body'; expected exactly one"),
        ({"re:(": 0.5}, "'re:(' is not a regular expression"),
    ],
)
def test_per_layer_names_layers_and_keys_that_do_not_match(sparsities, message):
    with pytest.raises(TargetError, match=re.escape(message)):
        PerLayer(sparsities).budgets({"stem.weight": (9,), "body.weight": (9,), "head.weight": (9,)}, 0.5)


@pytest.mark.parametrize("sparsities", [{}, {"a": 1.0}, {"a": -0.1}, {"a": float("nan")}])
def test_per_layer_refuses_an_empty_map_and_what_is_no_sparsity(sparsities):
    with pytest.raises(ConfigError):
        PerLayer(sparsities)


def test_per_layer_is_a_value_that_is_frozen_hashable_and_made_again_from_its_field():
    layers = PerLayer({"a": 0.5, "b*": 0.9})
    assert layers == PerLayer([["a", 0.5], ["b*", 0.9]]) == dataclasses.replace(layers)
    assert hash(layers) == hash(PerLayer(layers.sparsities))
    assert pickle.loads(pickle.dumps(layers)) == layers
    with pytest.raises(dataclasses.FrozenInstanceError):
        layers.sparsities = ()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_by_name_keeps_everything_at_sparsity_zero(name):
    budgets = DISTRIBUTIONS[name]().budgets(RAGGED, 0.0)
    assert sum(budget.kept for budget in budgets) == sum(map(math.prod, RAGGED.values()))
