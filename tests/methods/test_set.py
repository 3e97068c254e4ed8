"""SET: what an update drops and grows, against counts and sorting of its own."""

import pytest
import torch
from torch import nn

import sparsetwin as st


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 5))


def make(every=3, seed=0, **fields):
    model = network()
    schedule = st.schedules.periodic(sparsity=0.8, total_steps=12, every_steps=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, st.Sparsifier(st.SET(schedule=schedule, **fields), model, optimizer, seed=seed)


def train(model, optimizer, sparsifier, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(sparsifier.steps)
        sparsifier.begin_step()
        inputs, labels = torch.randn(8, 2, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("distribution", [st.ERK(), st.Uniform()])
@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_an_update_drops_the_smallest_and_grows_as_many_pruned_ones_from_zero(distribution, fraction):
    _, optimizer, sparsifier = run = make(distribution=distribution, drop_fraction=fraction)
    train(*run, steps=3)
    old = dict(sparsifier.masks)
    weights = {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}
    momenta = {n: optimizer.state[w]["momentum_buffer"].clone() for n, w in sparsifier.weights.items()}
    sparsifier.begin_step()  # before any gradient
    for name, mask in sparsifier.masks.items():
        count = int(old[name].sum())
        largest_first = weights[name].abs().masked_fill(~old[name], -1).flatten().argsort(descending=True, stable=True)
        survivors = torch.zeros(mask.numel(), dtype=torch.bool)
        survivors[largest_first[: count - int(fraction * count)]] = True
        assert mask.flatten()[survivors].all()
        assert int(mask.sum()) == count
        new = mask & ~old[name]
        assert new.any()
        assert torch.equal(sparsifier.weights[name].detach(), torch.where(mask, weights[name], 0))
        left = optimizer.state[sparsifier.weights[name]]["momentum_buffer"]
        assert torch.equal(left, torch.where(new, 0.0, momenta[name]))


def test_the_update_of_the_step_happens_as_ever():
    model, _, sparsifier = run = make()
    train(*run, steps=3)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    train(*run, steps=1)
    assert sparsifier.phase.index == 1
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_every_pruned_weight_is_as_likely_to_grow():
    """Growth from 40 places into 8 free ones, over many seeds, against the even share."""
    times, draws = torch.zeros(40), 200
    for seed in range(draws):
        model = nn.Linear(10, 4, bias=False)
        schedule = st.schedules.phases([(1, 0.75), (1, 0.75)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = st.SET(schedule=schedule, drop_fraction=1.0)
        sparsifier = st.Sparsifier(method, model, optimizer, seed=seed)
        for _ in range(2):
            sparsifier.begin_step()
            model(torch.zeros(1, 10)).sum().backward()
            optimizer.step()
        times += sparsifier.masks["weight"].flatten()
    share = 10 / 40  # all ten are dropped, and all places are free
    spread = (draws * share * (1 - share)) ** 0.5
    assert int(times.sum()) == 10 * draws
    assert (times - draws * share).abs().max() < 4 * spread


def test_what_is_grown_depends_on_the_seed_and_on_nothing_else():
    def masks(seed):
        run = make(seed=seed)
        train(*run, steps=7)
        return run[2].masks

    first, again, other = masks(1), masks(1), masks(2)
    assert all(torch.equal(mask, again[name]) for name, mask in first.items())
    assert all(not torch.equal(mask, other[name]) for name, mask in first.items())
