"""The small GPT: causal, untied, and initialised as GPT-2."""

import math

import pytest
import torch
from torch import nn

from sparsetwin.errors import ConfigError
from sparsetwin.models import gpt


def small(**options):
    torch.manual_seed(0)
    return gpt(50, **{"context": 12, "layers": 2, "heads": 2, "width": 16} | options)


def test_logits_have_one_row_a_token_and_one_column_a_word():
    assert small()(torch.zeros(3, 7, dtype=torch.int64)).shape == (3, 7, 50)


def test_no_position_sees_a_later_token():
    model = small().eval()
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=0, atol=1e-6)
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


def test_position_matters():
    logits = small()(torch.full((1, 3), 4))
    assert not torch.allclose(logits[0, 0], logits[0, 2])


def test_head_is_not_tied_to_the_embedding():
    model = small()
    assert model.head.weight is not model.token_embedding.weight
    assert not torch.equal(model.head.weight, model.token_embedding.weight)


def test_every_parameter_gets_a_gradient():
    model = small()
    model(torch.randint(50, (2, 12))).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_weights_start_with_deviation_0_02_and_less_where_a_residual_branch_ends():
    model = small(width=128, layers=8)
    deviation = 0.02 / math.sqrt(16)
    block = model.blocks[3]
    assert block.expand.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.contract.weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert block.attention.out.weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert not any(
        module.bias.any() for module in model.modules() if isinstance(module, nn.Linear) and module is not model.head
    )


def test_first_guess_is_nearly_uniform():
    tokens = torch.randint(50, (4, 12))
    loss = nn.functional.cross_entropy(small()(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    tokens = torch.randint(50, (1, 12))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_a_seed_reproduces_the_initial_weights():
    assert all(
        torch.equal(a, b) for a, b in zip(small().state_dict().values(), small().state_dict().values(), strict=True)
    )


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ConfigError, match="context of 12 tokens, got 13"):
        small()(torch.zeros(1, 13, dtype=torch.int64))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="got 3 heads and width 16"):
        small(heads=3)


@pytest.mark.parametrize("size", ["context", "layers", "heads", "width"])
def test_sizes_below_one_are_refused_by_name(size):
    with pytest.raises(ConfigError, match=f"{size} needs to be at least 1, got 0"):
        small(**{size: 0})
