"""Kept weights: ``N - round(s * N)`` of a group, and budgets that cannot be met are refused."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetwin.distributions import Budget, Global, Uniform, check_budgets
from sparsetwin.errors import SelectionError

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


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.5, 12_751_456), (0.8, 5_100_582), (0.9, 2_550_291), (0.95, 1_275_146), (0.98, 510_058)]
)
def test_resnet50_keeps_the_published_numbers_of_weights_rounded_instead_of_floored(sparsity, kept):
    assert Global().budgets({"resnet50": RESNET50}, sparsity) == (Budget(("resnet50",), kept),)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_is_one_budget_over_all_layers(sparsity):
    assert Global().budgets(SIZES, sparsity) == (Budget(("a", "b", "c"), GLOBAL_KEPT[sparsity]),)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uniform_is_a_budget_for_each_layer_of_at_least_one_weight(sparsity):
    expected = tuple(Budget((name,), count) for name, count in zip(SIZES, UNIFORM_KEPT[sparsity], strict=True))
    assert Uniform().budgets(SIZES, sparsity) == expected


@given(sizes, sparsities)
def test_a_budget_is_within_half_a_weight_of_what_was_asked(sizes, sparsity):
    (budget,) = Global().budgets(sizes, sparsity)
    total = sum(sizes.values())
    rounding = Fraction(total) / 2**52  # of the product s * N as a float
    assert abs(budget.kept - (total - Fraction(sparsity) * total)) <= Fraction(1, 2) + rounding
    assert budget.names == tuple(sizes)
    for budget, (name, size) in zip(Uniform().budgets(sizes, sparsity), sizes.items(), strict=True):
        assert budget.names == (name,)
        wanted = size - Fraction(sparsity) * size
        assert abs(budget.kept - wanted) <= Fraction(1, 2) + rounding or (budget.kept == 1 and wanted < 1)
        assert 1 <= budget.kept <= size


@given(sizes)
def test_sparsity_zero_keeps_everything(sizes):
    assert Global().budgets(sizes, 0.0)[0].kept == sum(sizes.values())
    assert sum(budget.kept for budget in Uniform().budgets(sizes, 0.0)) == sum(sizes.values())


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
