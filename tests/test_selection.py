"""Selection keeps exactly the best: the counts, the ranking, the ties, whatever the dtype and the memory layout."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from selection_cases import (
    DTYPES,
    LAYOUTS,
    assert_same,
    by_magnitude,
    by_value,
    channels_last,
    contiguous,
    kept,
    layers,
    reference,
    select,
    shapes_of,
    transposed,
    values,
)
from sparsetwin.distributions import Budget, Global, Uniform
from sparsetwin.errors import SelectionError
from sparsetwin.selection import reference_masks, select_masks
from sparsetwin.targets import Targets

SHAPES = {"a": (7, 5, 3, 3), "b": (64, 37), "c": (11,)}
GLOBAL_KEPT = {0.5: 1347, 0.8: 539, 0.9: 269, 0.95: 135, 0.98: 54, 0.999: 3}  # N - round(s * N) of 2,694
UNIFORM_KEPT = {
    0.5: (157, 1184, 5),
    0.8: (63, 474, 2),
    0.9: (31, 237, 1),
    0.95: (16, 118, 1),
    0.98: (6, 47, 1),
    0.999: (1, 2, 1),
}
SPARSITIES = tuple(GLOBAL_KEPT)
distributions = st.sampled_from([Global(), Uniform()])
sparsities = st.sampled_from([0.0, 0.1, *SPARSITIES]) | st.floats(0, 0.999)
scores = st.sampled_from([by_magnitude, by_value])


def weights_of(dtype, layout, shapes=SHAPES):
    return {name: layout(values(shape, dtype, seed)) for seed, (name, shape) in enumerate(shapes.items())}


def possible(weights, distribution, sparsity, minimum_kept=1):
    budgets = distribution.budgets(shapes_of(weights), sparsity)
    return all(
        budget.kept >= sum(min(minimum_kept, weights[name].numel()) for name in budget.names) for budget in budgets
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_exactly_the_requested_number_of_weights_is_kept(sparsity, dtype, layout):
    weights = weights_of(dtype, layout)
    whole = kept(select(weights, Global(), sparsity))
    assert sum(whole.values()) == GLOBAL_KEPT[sparsity]
    assert min(whole.values()) >= 1
    assert tuple(kept(select(weights, Uniform(), sparsity)).values()) == UNIFORM_KEPT[sparsity]


@settings(max_examples=250, deadline=None)
@given(layers(), distributions, sparsities, scores, st.integers(0, 3))
def test_masks_are_those_of_the_plain_reference(weights, distribution, sparsity, score, minimum_kept):
    assume(possible(weights, distribution, sparsity, minimum_kept))
    given = (weights, distribution, sparsity)
    masks = select(*given, score=score, minimum_kept=minimum_kept)
    assert_same(masks, reference(*given, score=score, minimum_kept=minimum_kept))


@settings(max_examples=50, deadline=None)
@given(layers(), distributions, sparsities)
def test_no_kept_weight_is_smaller_than_a_pruned_one_unless_its_layer_would_be_empty(weights, distribution, sparsity):
    assume(possible(weights, distribution, sparsity))
    masks = select(weights, distribution, sparsity)
    assert min(kept(masks).values()) >= 1
    for budget in distribution.budgets(shapes_of(weights), sparsity):
        magnitudes = {name: weights[name].abs().double() for name in budget.names}
        ranked = [name for name in budget.names if int(masks[name].sum()) > 1]
        smallest = min((magnitudes[name][masks[name]].min() for name in ranked), default=torch.tensor(torch.inf))
        for name in budget.names:
            if not masks[name].all() and ranked:
                assert magnitudes[name][~masks[name]].max() <= smallest


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_kept_in_the_order_of_the_layers_then_row_major(dtype):
    weights = {name: torch.full(shape, 0.25, dtype=dtype) for name, shape in SHAPES.items()}
    masks = select(weights, Global(), 0.5)  # 1,347: all of a, the first 1,031 of b and the one that c keeps
    assert masks["a"].all()
    assert masks["b"].flatten().tolist() == [True] * 1031 + [False] * (2368 - 1031)
    assert masks["c"].tolist() == [True] + [False] * 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", [Global(), Uniform()])
def test_the_choice_does_not_depend_on_the_memory_layout_and_masks_have_that_of_their_weight(distribution, dtype):
    given = {name: values(shape, dtype, 3) for name, shape in SHAPES.items()}
    expected = select(given, distribution, 0.8)
    for layout in LAYOUTS:
        weights = {name: layout(weight) for name, weight in given.items()}
        masks = select(weights, distribution, 0.8)
        assert_same(masks, expected)
        if layout in (contiguous, channels_last, transposed):
            assert {name: mask.stride() for name, mask in masks.items()} == {n: w.stride() for n, w in weights.items()}


def test_negative_zero_ties_with_zero():
    weights = {"a": torch.tensor([-0.0, 0.0, -0.0, -1.0, 0.0])}
    masks = select_masks(weights, by_value(weights), [Budget(("a",), 2)])
    assert masks["a"].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_the_largest_and_the_smallest_scores(dtype):
    weight = torch.tensor([-torch.inf, torch.finfo(dtype).max, torch.inf, 0.0, torch.finfo(dtype).min], dtype=dtype)
    order = [2, 1, 3, 4, 0]  # best first
    for count in range(1, 6):
        mask = select_masks({"a": weight}, lambda name: weight, [Budget(("a",), count)])["a"]
        assert mask.nonzero().flatten().tolist() == sorted(order[:count])


@pytest.mark.parametrize("distribution", [Global(), Uniform()])
def test_layers_that_are_all_zero_keep_their_share_by_the_tie_rule(distribution):
    weights = {"a": torch.zeros(4, 6), "b": torch.randn(5, 5), "c": torch.zeros(3, 3)}
    masks = select(weights, distribution, 0.5)
    assert_same(masks, reference(weights, distribution, 0.5))
    assert sum(kept(masks).values()) == (29 if distribution == Global() else 12 + 13 + 5)
    if distribution == Global():  # all 25 of b, 3 of a by the tie rule, one that c keeps
        assert kept(masks) == {"a": 3, "b": 25, "c": 1}
        assert masks["a"].flatten().nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float16), (torch.float16, torch.float32, torch.float64), (torch.float64, torch.bfloat16)],
)
def test_layers_of_mixed_dtypes_are_compared_by_their_exact_values(dtypes):
    # a third is larger in bfloat16 than in float16, and different again in the wider types
    weights = {f"{index}": torch.full((3,), 1 / 3, dtype=dtype) for index, dtype in enumerate(dtypes)}
    weights["small"] = torch.full((3,), 0.25, dtype=dtypes[0])
    masks = select_masks(weights, by_magnitude(weights), [Budget(tuple(weights), 5)], minimum_kept=0)
    assert_same(masks, reference_masks(weights, by_magnitude(weights), [Budget(tuple(weights), 5)], minimum_kept=0))
    best = max(weights, key=lambda name: weights[name][0].double())
    assert masks[best].all()
    assert not masks["small"].any()


def test_a_tied_weight_is_selected_once():
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    weights = Targets().resolve(nn.Sequential(first, second, nn.Linear(6, 4, bias=False)))
    masks = select(weights, Global(), 0.5)
    assert list(masks) == ["0.weight", "2.weight"]
    assert sum(kept(masks).values()) == 30


def test_selection_leaves_the_weights_as_they_are_and_builds_no_graph():
    weight = nn.Parameter(torch.randn(20, 20))
    before = weight.detach().clone()
    mask = select({"a": weight}, Global(), 0.9, score=lambda given: lambda name: given[name] * 1)["a"]
    assert torch.equal(weight, before)
    assert not mask.requires_grad


def test_the_masks_are_the_same_again_and_for_any_number_of_threads():
    torch.manual_seed(0)
    weights = {"a": torch.randn(300, 500).half(), "b": torch.randn(700, 100).half()}  # several pieces, many ties
    first = select(weights, Global(), 0.9)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert_same(select(weights, Global(), 0.9), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.999])
def test_the_smallest_kept_magnitude_is_the_kthvalue_of_all(sparsity, dtype):
    torch.manual_seed(1)
    weights = {"a": torch.randn(400, 331).to(dtype), "b": 0.1 * torch.randn(90, 411).to(dtype), "c": torch.randn(7)}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
    (budget,) = Global().budgets(shapes_of(weights), sparsity)
    threshold = everything.kthvalue(everything.numel() - budget.kept + 1).values
    masks = select_masks(weights, by_magnitude(weights), [budget], minimum_kept=0)
    chosen = torch.cat([weights[name].abs()[masks[name]] for name in weights])
    assert chosen.numel() == budget.kept
    assert chosen.min() == threshold
    assert (everything > threshold).sum() == (chosen > threshold).sum()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accelerator_chooses_the_same_weights(dtype):
    weights = {name: values(shape, dtype, 5) for name, shape in SHAPES.items()}
    moved = {name: channels_last(weight.cuda()) for name, weight in weights.items()}
    for score in (by_magnitude, by_value):
        masks = select(moved, Global(), 0.8, score=score)
        assert all(mask.is_cuda for mask in masks.values())
        assert_same({n: mask.cpu() for n, mask in masks.items()}, select(weights, Global(), 0.8, score=score))


def test_a_score_that_changes_between_readings_is_refused():
    weights = {"a": torch.zeros(50, 50)}
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(SelectionError, match="a score changed from one reading to the next, among a"):
        select_masks(weights, lambda name: torch.randn(50, 50, generator=generator), [Budget(("a",), 100)])
