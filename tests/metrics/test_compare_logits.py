"""How alike two models answer."""

import math

import pytest
import torch

from sparsetwin.errors import ConfigError
from sparsetwin.metrics import compare_logits


def test_values_are_those_worked_out_by_hand():
    first = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    second = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    agreement = compare_logits(first, second)
    assert (agreement.samples, agreement.same_top1) == (2, 0.5)
    assert agreement.kl_divergence == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)


def test_a_model_agrees_with_itself():
    logits = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    agreement = compare_logits(logits, logits)
    assert (agreement.same_top1, agreement.kl_divergence) == (1.0, 0.0)


def test_a_constant_on_all_logits_changes_nothing():
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    agreement = compare_logits(logits, logits + 7)
    assert agreement.same_top1 == 1.0
    assert agreement.kl_divergence == pytest.approx(0.0, abs=1e-12)


def test_tokens_are_samples():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert compare_logits(logits, logits.flip(0)) == compare_logits(logits.flatten(0, 1), logits.flip(0).flatten(0, 1))
    assert compare_logits(logits, logits).samples == 6


def test_half_precision_logits_are_compared_in_float64():
    logits = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert compare_logits(logits, -logits).kl_divergence == pytest.approx(119_936.0, rel=1e-3)


@pytest.mark.parametrize(
    ("first", "second"), [((2, 3), (2, 4)), ((2, 3), (3, 3)), ((0, 3), (0, 3)), ((2, 0), (2, 0)), ((), ())]
)
def test_other_shapes_are_refused(first, second):
    with pytest.raises(ConfigError, match=r"logits .* of the same samples"):
        compare_logits(torch.zeros(first), torch.zeros(second))
