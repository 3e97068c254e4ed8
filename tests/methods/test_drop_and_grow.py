"""One update of a layer's mask, worked out by hand and against plain sorting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsetwin
from sparsetwin.errors import ConfigError, ScheduleError, SelectionError, UsageError
from sparsetwin.methods import METHODS, exploration
from sparsetwin.methods._drop_and_grow import drop_and_grow, reference_drop_and_grow
from sparsetwin.schedules import constant, periodic, phases

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bools(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.bool)


WEIGHT = torch.tensor([5.0, -0.5, 0.0, 2.0, 0.0, -1.0, 0.0, 3.0])
MASK = bools(1, 1, 0, 1, 0, 1, 0, 1)  # keeps 5; by magnitude 5, 3, 2, 1, 0.5


def test_the_smallest_are_dropped_and_the_best_scored_grown():
    score = torch.tensor([9.0, 1.0, 4.0, 9.0, 2.0, 0.5, 3.0, 9.0])
    # 0.4 * 5 = 2 are dropped: -0.5 and -1. Pruned then: places 1, 2, 4, 5, 6 with scores 1, 4, 2, 0.5, 3.
    assert torch.equal(drop_and_grow(WEIGHT, MASK, grow_score=score, fraction=0.4), bools(1, 0, 1, 1, 0, 0, 1, 1))


def test_a_weight_that_is_dropped_may_grow_again():
    score = torch.tensor([0.0, 7.0, 4.0, 0.0, 2.0, 0.5, 3.0, 0.0])
    assert torch.equal(drop_and_grow(WEIGHT, MASK, grow_score=score, fraction=0.4), bools(1, 1, 1, 1, 0, 0, 0, 1))


def test_of_equal_magnitudes_and_scores_the_earlier_are_kept_and_grown():
    ones = torch.ones(2, 3)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    # 0.5 * 4 = 2 stay: the earlier two, places 0 and 2; then the earlier two of the others, places 1 and 3
    expected = torch.tensor([[True, True, True], [True, False, False]])
    assert torch.equal(drop_and_grow(ones, mask, grow_score=ones, fraction=0.5), expected)


@pytest.mark.parametrize(
    ("kept", "fraction", "dropped"), [(10, 0.3, 3), (9, 0.3, 2), (3, 0.3, 0), (100, 0.29, 29), (1, 0.9, 0), (1, 1.0, 1)]
)
def test_the_number_dropped_is_the_fraction_rounded_down(kept, fraction, dropped):
    weight = torch.arange(1.0, 201.0)
    mask = torch.arange(200) < kept
    score = torch.where(mask, -1.0, 1.0)  # what was pruned before is grown first
    after = drop_and_grow(weight, mask, grow_score=score, fraction=fraction)
    assert int(after.sum()) == kept
    assert int((mask & ~after).sum()) == dropped


def test_a_dense_layer_has_nothing_to_grow_but_what_it_dropped():
    weight, mask = torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    assert drop_and_grow(weight, mask, grow_score=torch.rand(4, 5), fraction=0.5).all()


def test_fewer_are_pruned_than_are_to_be_grown():
    weight, mask = torch.arange(1.0, 7.0), bools(1, 1, 1, 1, 1, 0)
    after = drop_and_grow(weight, mask, grow_score=torch.tensor([3.0, 1.0, 2.0, 0, 0, 9.0]), fraction=0.6)
    # 3 are dropped, places 0, 1, 2; one place was free, so two of the dropped come back, the best-scored
    assert torch.equal(after, bools(1, 0, 1, 1, 1, 1))


@pytest.mark.parametrize(("kept", "expected"), [(3, bools(1, 0, 1, 0, 0, 0, 0, 1)), (7, bools(1, 1, 1, 1, 1, 0, 1, 1))])
def test_a_layer_may_keep_fewer_or_more_than_before(kept, expected):
    score = torch.tensor([0.0, 7.0, 8.0, 0.0, 2.0, 0.5, 3.0, 0.0])
    # 3: pruned to 5, 3, 2, of which 0.4 * 3 = 1 is dropped; 7: 2 of 5 are dropped, and 4 grown
    assert torch.equal(drop_and_grow(WEIGHT, MASK, grow_score=score, fraction=0.4, kept=kept), expected)


@st.composite
def layers(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    values = [0.0, 0.5, 1.0, 1.0, 2.0, torch.inf]  # many are equal
    pick = torch.tensor(values, dtype=draw(st.sampled_from(DTYPES)))[torch.randint(6, shape, generator=generator)]
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))
    weight = pick * torch.where(torch.rand(shape, generator=generator) < 0.5, 1, -1).to(pick.dtype)
    score = torch.randint(4, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    if len(shape) == 4 and draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    kept = draw(st.one_of(st.none(), st.integers(0, weight.numel())))
    return torch.where(mask, weight, 0), mask, score, draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])), kept


@given(layers())
@settings(max_examples=150, deadline=None)
def test_it_agrees_with_sorting_single_weights_and_counts_are_exact(layer):
    weight, mask, score, fraction, kept = layer
    after = drop_and_grow(weight, mask, grow_score=score, fraction=fraction, kept=kept)
    assert torch.equal(after, reference_drop_and_grow(weight, mask, grow_score=score, fraction=fraction, kept=kept))
    assert int(after.sum()) == (int(mask.sum()) if kept is None else kept)


@pytest.mark.parametrize("where", ["weight", "score"])
def test_nan_is_refused_and_the_weight_named(where):
    nan = torch.full((8,), torch.nan)
    weight, score = (nan, WEIGHT) if where == "weight" else (WEIGHT, nan)
    with pytest.raises(SelectionError, match=r"scores of conv1\.weight are NaN"):
        drop_and_grow(weight, MASK, grow_score=score, fraction=0.4, name="conv1.weight")


# Fields and schedules


@pytest.mark.parametrize("name", ["set", "rigl"])
@pytest.mark.parametrize("lengths", [[(2, 0.0), (2, 0.8)], [(2, 0.8), (2, 0.9)], [(2, 0.0)]])
def test_schedules_of_more_than_one_sparsity_are_refused(name, lengths):
    with pytest.raises(ScheduleError, match=r"keeps one sparsity above 0 .* schedules\.periodic"):
        METHODS[name](schedule=phases(lengths))


@pytest.mark.parametrize("lengths", [[(2, 0.8), (2, 0.7)], [(2, 0.5), (2, 0.0)], [(2, 0.0)]])
def test_granet_refuses_a_sparsity_that_falls(lengths):
    with pytest.raises(ScheduleError, match="sparsity rises"):
        sparsetwin.GraNet(schedule=phases(lengths))


@pytest.mark.parametrize("name", ["set", "rigl", "granet"])
@pytest.mark.parametrize(
    "field", [{"drop_fraction": 1.5}, {"drop_fraction": -0.1}, {"decay": "linear"}, {"distribution": "erk"}]
)
def test_a_field_without_meaning_is_refused(name, field):
    with pytest.raises(ConfigError, match=f"got {next(iter(field.values()))!r}"):
        METHODS[name](schedule=periodic(sparsity=0.8, total_steps=4, every_steps=2), **field)


@pytest.mark.parametrize("name", ["set", "rigl", "granet"])
def test_a_sparsity_that_would_empty_a_layer_is_refused_at_construction(name):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    method = METHODS[name](schedule=periodic(sparsity=0.9, total_steps=4, every_steps=2))
    with pytest.raises(SelectionError, match="too few for 2 layers"):
        sparsetwin.Sparsifier(method, model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("name", ["set", "rigl"])
@pytest.mark.parametrize(("stop_step", "end"), [(75, 80), (80, 80), (None, 100)])
def test_the_cosine_comes_down_to_zero_where_updates_end(name, stop_step, end):
    schedule = periodic(sparsity=0.8, total_steps=100, every_steps=10, stop_step=stop_step)
    method = METHODS[name](schedule=schedule, drop_fraction=0.3, decay="cosine")
    assert method.fraction_at(0) == 0.3
    assert method.fraction_at(end // 2) == pytest.approx(0.15)
    assert method.fraction_at(10) == 0.3 / 2 * (1 + math.cos(math.pi * 10 / end))
    assert method.fraction_at(schedule.phases[-1].start) > 0
    assert method.fraction_at(end) == method.fraction_at(100) == 0
    constant_one = METHODS[name](schedule=schedule, drop_fraction=0.3, decay="constant")
    assert constant_one.fraction_at(90) == 0.3


def test_the_cosine_of_granet_comes_down_to_zero_at_the_end_of_the_schedule():
    schedule = sparsetwin.schedules.gradual(sparsity=0.9, total_steps=80, start_step=0, stop_step=40, every_steps=10)
    method = sparsetwin.GraNet(schedule=schedule)
    assert (method.fraction_at(0), method.fraction_at(80)) == (0.5, 0.0)
    assert method.fraction_at(40) == pytest.approx(0.25)


# First masks and what was explored


@pytest.mark.parametrize("name", ["set", "rigl", "granet"])
def test_first_masks_are_random_and_there_before_any_forward_pass(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8, 40), nn.Linear(40, 3))
    method = METHODS[name](schedule=constant(sparsity=0.8, total_steps=4))
    sparsifier = sparsetwin.Sparsifier(method, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not method.needs_gradients(method.schedule.phases[0])
    before = {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}
    sparsifier.begin_step()
    assert all(parameter.grad is None for parameter in model.parameters())
    budgets = sparsetwin.ERK().budgets({name: weight.shape for name, weight in before.items()}, 0.8)
    assert {b.names[0]: b.kept for b in budgets} == {n: int(mask.sum()) for n, mask in sparsifier.masks.items()}
    largest = sparsetwin.select_masks(before, lambda name: before[name].abs(), budgets)
    assert all(not torch.equal(mask, largest[name]) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("name", ["set", "rigl", "granet"])
def test_the_seed_of_the_sparsifier_draws_the_first_masks(name):
    def first(seed):
        model = nn.Linear(20, 20)
        method = METHODS[name](schedule=constant(sparsity=0.8, total_steps=4))
        sparsifier = sparsetwin.Sparsifier(method, model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed)
        sparsifier.begin_step()
        return sparsifier.masks["weight"]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_exploration_is_the_share_of_weights_that_any_mask_kept(name):
    model = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = periodic(sparsity=0.8, total_steps=12, every_steps=3)
    sparsifier = sparsetwin.Sparsifier(METHODS[name](schedule=schedule), model, optimizer)
    with pytest.raises(UsageError, match="nothing is known"):
        exploration(sparsifier.state_dict())
    ever, shares = torch.zeros(20, 20, dtype=torch.bool), []
    for step in range(12):
        sparsifier.begin_step()
        model(torch.randn(4, 20, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ever |= sparsifier.masks["weight"]
        shares.append(exploration(sparsifier.state_dict()))
        assert shares[-1] == int(ever.sum()) / 400
    assert shares[0] == 0.2
    assert shares[0] < shares[3] < shares[6]

    twin = nn.Linear(20, 20)
    twin.load_state_dict(model.state_dict())
    resumed = sparsetwin.Sparsifier(sparsifier.method, twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    resumed.load_state_dict(sparsifier.state_dict())
    assert exploration(resumed.state_dict()) == shares[-1]


def test_a_method_without_memory_has_no_exploration():
    model = nn.Linear(20, 20)
    method = sparsetwin.GraNet(schedule=constant(sparsity=0.8, total_steps=4))
    sparsifier = sparsetwin.Sparsifier(method, model, torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.begin_step()
    with pytest.raises(UsageError, match="SET or RigL"):
        exploration(sparsifier.state_dict())
