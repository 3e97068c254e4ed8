"""Scores of a weight, and where they are looked up."""

import pytest
import torch
from hypothesis import given, settings

from selection_cases import layers
from sparsetwin.errors import ConfigError
from sparsetwin.scores import magnitude, score_named


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
    assert score_named("magnitude") is magnitude
    with pytest.raises(ConfigError, match="unknown score 'magnitud'; known: magnitude; did you mean 'magnitude'"):
        score_named("magnitud")
