"""Dense training through the same code is plain training."""

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ScheduleError
from sparsetwin.methods import METHODS


def trained(*, with_sparsifier: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if with_sparsifier:
        method = st.Dense(schedule=st.schedules.phases([(3, 0.0), (2, 0.0), (3, 0.0)]))
        sparsifier = st.Sparsifier(method, model, optimizer)
    for _ in range(8):
        if with_sparsifier:
            sparsifier.begin_step()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if with_sparsifier:
            assert (sparsifier.masks, sparsifier.sparsity()) == ({}, 0.0)
            assert sparsifier.phase_ends == (sparsifier.steps in (3, 5, 8))
    return model


def test_dense_training_has_the_bits_of_training_without_us():
    ours, plain = trained(with_sparsifier=True), trained(with_sparsifier=False)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


def test_dense_refuses_a_schedule_with_a_sparse_phase():
    with pytest.raises(ScheduleError, match=r"no sparse phases, got Phase\(index=1, start=2, stop=4, sparsity=0\.5\)"):
        st.Dense(schedule=st.schedules.phases([(2, 0.0), (2, 0.5)]))


def test_methods_are_listed_under_the_names_of_recipes():
    assert {"acdc": st.ACDC, "dense": st.Dense}.items() <= METHODS.items()
    assert all(method.__doc__ for method in METHODS.values())
