"""What is pruned stays pruned, though a layer's rounded share may rise by a weight while the sparsity rises."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies
from small_network import loss_of, network

import sparsetwin as st
from sparsetwin.distributions import ERK, Budget, Distribution, PerLayer, limited
from sparsetwin.methods import Method

PHASES = 40
SIZE = 27 + 384 + 32  # weights of the network
RAMP = st.schedules.gradual(sparsity=0.9, total_steps=PHASES + 1, start_step=1, stop_step=PHASES, every_steps=1)
ROUNDS = st.schedules.rounds(sparsity=0.9, count=PHASES - 1, round_steps=1)
MAP = PerLayer({"0.weight": 0.31, "4.weight": 0.95, "6.weight": 0.52})
METHODS = {
    "gmp": lambda d: st.GMP(schedule=RAMP, distribution=d),
    "gmp-random": lambda d: st.GMP(schedule=RAMP, distribution=d, score="random"),
    "acdc-ramp": lambda d: st.ACDC(schedule=RAMP, distribution=d),
    "imp": lambda d: st.IMP(schedule=ROUNDS, distribution=d),
    "woodfisher": lambda d: st.WoodFisher(schedule=RAMP, distribution=d, samples=2, block_size=10, damping=1e-3),
}


def course(method: Method) -> list[dict[str, torch.Tensor]]:
    """Masks of each step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sample = {"gradient_pass": lambda index: loss_of(model, 100 + index).backward()}
    sparsifier = st.Sparsifier(method, model, optimizer, **sample)
    found = []
    for step in range(method.schedule.total_steps):
        sparsifier.begin_step()
        found.append(dict(sparsifier.masks))
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.filterwarnings("ignore:layers that keep fewer")
@pytest.mark.parametrize("distribution", [ERK(), MAP], ids=["erk", "per-layer"])
@pytest.mark.parametrize("name", METHODS)
def test_no_weight_grows_again_and_the_total_is_exact(name: str, distribution: Distribution) -> None:
    method = METHODS[name](distribution)
    sparse = [(method.schedule.at(step), masks) for step, masks in enumerate(course(method)) if masks]
    assert len(sparse) >= PHASES - 1
    for phase, masks in sparse:
        assert sum(int(mask.sum()) for mask in masks.values()) == SIZE - round(phase.sparsity * SIZE), phase
    for (_, before), (phase, masks) in pairwise(sparse):
        for target, mask in masks.items():
            assert not bool((mask & ~before[target]).any()), f"{target} grew in {phase}"


counts = strategies.integers(1, 20)


@given(strategies.lists(strategies.tuples(counts, counts), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_limited_budgets_keep_the_sum_and_none_has_more_than_there_is(pairs: list[tuple[int, int]]) -> None:
    budgets = tuple(Budget((f"layer{i}",), kept) for i, (kept, _) in enumerate(pairs))
    available = {f"layer{i}": limit for i, (_, limit) in enumerate(pairs)}
    result = limited(budgets, available)
    assert [budget.names for budget in result] == [budget.names for budget in budgets]
    assert sum(b.kept for b in result) == min(sum(b.kept for b in budgets), sum(available.values()))
    for before, after in zip(budgets, result, strict=True):
        assert min(before.kept, available[after.names[0]]) <= after.kept <= available[after.names[0]]
    if all(kept <= limit for kept, limit in pairs):
        assert result == budgets
