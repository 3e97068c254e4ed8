"""Scores of a weight, and where they are looked up."""

import pytest
import torch
from hypothesis import given, settings

from selection_cases import layers
from sparsetwin.errors import ConfigError
from sparsetwin.scores import SCORES, magnitude, random_scores, score_named


def strides(tensor):
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@settings(max_examples=50, deadline=None)
@given(layers())
def test_magnitudes_are_torchs_absolute_values_in_the_same_memory_format(weights):
    for weight in [*weights.values(), torch.tensor(-3.0), torch.empty(0, 3), torch.nn.Parameter(torch.randn(3, 2))]:
        scores, expected = magnitude(weight), weight.detach().abs()
        assert (scores.dtype, strides(scores)) == (expected.dtype, strides(expected))
        torch.testing.assert_close(scores, expected, rtol=0, atol=0)
        assert not scores.signbit().any()
        assert not scores.requires_grad


def test_the_magnitude_of_nan_is_nan():
    assert magnitude(torch.tensor([torch.nan, -1.0])).isnan().tolist() == [True, False]


def test_a_score_is_found_by_its_name_and_an_unknown_one_names_the_nearest():
    assert score_named("magnitude") is SCORES["magnitude"]
    with pytest.raises(
        ConfigError,
        match=r"unknown score 'magnitud'; known: magnitude, movement, .*random; did you mean 'magnitude'",
    ):
        score_named("magnitud")


def test_random_scores_depend_on_the_seed_and_the_shape_alone():
    weight = torch.randn(3, 4)
    first = random_scores(weight, seed=5)
    assert torch.equal(first, random_scores(torch.zeros(3, 4, dtype=torch.bfloat16), seed=5))
    assert not torch.equal(first, random_scores(weight, seed=6))
    assert first.unique().numel() == 12
    assert ((first >= 0) & (first < 1)).all()


def test_scores_that_remember_do_so_in_place():
    memory, weight = torch.tensor([1.0, 1.0]), torch.tensor([2.0, -3.0])
    SCORES["movement"].remember_(memory, weight, torch.tensor([0.5, 0.5]))
    assert memory.tolist() == [0.0, 2.5]
    SCORES["fisher"].remember_(memory, weight, torch.tensor([0.5, 2.0]))
    assert memory.tolist() == [0.25, 6.5]
    assert SCORES["fisher"].of(weight, memory).tolist() == [0.5, 29.25]
