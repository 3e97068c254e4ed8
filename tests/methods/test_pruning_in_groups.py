"""Patterns on the way to their sparsity: what is pruned stays pruned, and what groups cannot have is refused early."""

import pytest
import torch
from small_network import loss_of, network
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import ConfigError
from sparsetwin.grouped_selection import is_nm
from sparsetwin.methods import Method

phases = st.schedules.phases


def sparsified(method: Method, model: nn.Module) -> tuple[st.Sparsifier, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return st.Sparsifier(method, model, optimizer, targets=st.Targets(exclude=["0.weight"])), optimizer


def masks_of_each_phase(method: Method, model: nn.Module) -> list[dict[str, Tensor]]:
    sparsifier, optimizer = sparsified(method, model)
    found = []
    for step in range(method.schedule.total_steps):
        sparsifier.begin_step()
        found.append(sparsifier.masks)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_no_channel_grows_again_where_a_small_dead_one_would_come_nearer_to_the_budget():
    """Of 5 channels of 4 and 4 of 10, one of each goes: 46 are left of 49. With the dead one of 4 it would be 50."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(4, 5, bias=False), nn.Linear(10, 4, bias=False))
    with torch.no_grad():
        for layer, worst in ((model[1], 0.1), (model[2], 0.2)):
            layer.weight.fill_(3.0)[0] = worst
    sparsities = (4 / 60, 11 / 60, 0.19, 0.2)  # 56, 49, 49 and 48 of 60 weights
    sparsifier, optimizer = sparsified(st.GMP(schedule=phases((1, s) for s in sparsities), pattern=st.Channel()), model)
    found = []
    for _ in sparsities:
        sparsifier.begin_step()
        found.append([mask[:, 0].tolist() for mask in sparsifier.masks.values()])
        optimizer.step()
    one_dead = [[False, True, True, True, True], [False, True, True, True]]
    assert found == [[one_dead[0], [True] * 4], one_dead, one_dead, one_dead]


def test_a_ramp_of_blocks_goes_on_from_those_that_live_whatever_the_score():
    method = st.ACDC(schedule=phases([(1, 0.57), (1, 0.57), (1, 0.6)]), pattern=st.Block(4, 4), score="random")
    first, second, third = masks_of_each_phase(method, network())
    for name in first:
        assert torch.equal(first[name], second[name])
        assert bool((second[name] | ~third[name]).all())


@pytest.mark.parametrize("seed", range(20))
def test_a_transposable_pattern_keeps_of_each_block_ever_fewer_of_those_that_live(seed):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(16, 12, bias=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # many ties, zeros among what lives, and values that swallow all others in a sum
        values = torch.randint(-2, 3, (12, 16), generator=generator).float()
        model[1].weight.copy_(torch.where(torch.rand(12, 16, generator=generator) < 0.1, 1e30, values))
    pattern = st.NM(1, 4, transposable=True)
    sparsifier, optimizer = sparsified(
        st.GMP(schedule=phases([(1, 0.25), (1, 0.5), (1, 0.75)]), pattern=pattern), model
    )
    before = torch.ones(12, 16, dtype=torch.bool)
    for kept in (3, 2, 1):
        sparsifier.begin_step()
        mask = sparsifier.masks["1.weight"]
        assert is_nm(mask, kept, 4, transposable=True)
        assert bool((before | ~mask).all())
        before = mask.clone()
        model[1].weight.grad = torch.zeros(12, 16)
        optimizer.step()


@pytest.mark.parametrize(
    ("schedule", "pattern", "message"),
    [
        (
            st.schedules.gradual(sparsity=0.5, total_steps=9, start_step=0, stop_step=8, every_steps=2),
            st.NM(2, 4),
            r"2:4 keeps 2 of every 4 weights, a sparsity of 0.5; got 0.289.*schedules.grouped\(schedule, m=4\)",
        ),
        (phases([(1, 0.0), (1, 0.25)]), st.NM(2, 4), "the last sparse phase has a sparsity of 0.25, at which the patt"),
        (phases([(1, 0.25), (1, 0.5)]), st.NM(4, 8, transposable=True), "step by step for m up to 4 only"),
    ],
)
def test_phases_that_groups_cannot_have_are_refused_before_training(schedule, pattern, message):
    for method in (st.GMP(schedule=schedule, pattern=pattern), st.ACDC(schedule=schedule, pattern=pattern)):
        with pytest.raises(ConfigError, match=message):
            sparsified(method, network())
