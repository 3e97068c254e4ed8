"""Trials that look for a sparsity which cannot be asked for."""

import math

import pytest
import torch

from sparsetwin.comparison._aim import CLOSE, Aim, Tried, best_trial, next_value

AIM = Aim(path="method.options.initial", first=-4.0)


def trials(sparsity_of, goal: float, count: int) -> list[Tried]:
    tried: list[Tried] = []
    for _ in range(count):
        value = next_value(AIM, tried, goal=goal)
        tried.append(Tried(value=value, sparsity=sparsity_of(value), holdout=0.5))
    return tried


def layers(value: float, *, drift: float) -> float:
    """Return the sparsity of layers of other sizes and widths under one threshold that has grown in training."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) * width for n, width in ((4000, 0.2), (20000, 0.06), (9000, 0.02))]
    below = sum(int((w.abs() <= torch.sigmoid(torch.tensor(value + drift))).sum()) for w in weights)
    return below / 33000


@pytest.mark.parametrize("drift", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("goal", [0.5, 0.8, 0.9, 0.95, 0.98])
def test_six_trials_come_within_half_a_point(goal, drift):
    found = trials(lambda value: layers(value, drift=drift), goal, 6)
    assert min(abs(trial.sparsity - goal) for trial in found) <= CLOSE


def test_the_second_trial_goes_where_normal_weights_would_have_the_sparsity():
    def normal(value: float) -> float:
        return math.erf(math.exp(value) / 0.05 / math.sqrt(2))

    first, second = trials(normal, 0.9, 2)
    assert (first.value, second.value) == pytest.approx((-4.0, math.log(0.05 * 1.6448536)))
    assert second.sparsity == pytest.approx(0.9)


def test_a_network_without_weights_and_a_failed_trial_are_too_sparse():
    for sparsity in (1.0, math.nan):
        tried = [Tried(value=-1.0, sparsity=sparsity, holdout=math.nan)]
        assert next_value(AIM, tried, goal=0.9) < -1.0
        tried.append(Tried(value=-3.0, sparsity=0.7, holdout=0.9))
        assert -3.0 < next_value(AIM, tried, goal=0.9) < -1.0


def test_taken_is_the_best_of_those_that_came_close_or_the_nearest():
    def of(*pairs: tuple[float, float]) -> list[Tried]:
        return [Tried(value=0.0, sparsity=sparsity, holdout=holdout) for sparsity, holdout in pairs]

    assert best_trial(of((0.5, 0.99), (0.896, 0.90), (0.904, 0.91), (0.91, 0.95)), goal=0.9) == 2
    assert best_trial(of((0.5, 0.99), (0.89, 0.90), (0.94, 0.95), (math.nan, math.nan)), goal=0.9) == 1
