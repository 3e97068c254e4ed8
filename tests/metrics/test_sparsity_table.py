"""Exact zeros and kept weights, by layer."""

import pytest
import torch
from torch import nn

from sparsetwin.errors import StateError, TargetError
from sparsetwin.metrics import LayerSparsity, nonzero_counts, sparsity_table


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-0.0, float("nan")]]))
        model[0].bias.copy_(torch.tensor([0.0, 3.0]))
        model[1].weight.copy_(torch.tensor([[1e-45, 2.0]]))
    return model


def test_nonzeros_are_counted_exactly_and_nan_is_not_zero():
    assert nonzero_counts(two_layers()) == {"0.weight": 2, "0.bias": 1, "1.weight": 2}


def test_tied_weights_are_counted_once_under_their_first_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert nonzero_counts(model) == {"0.weight": 4}


def test_names_are_canonical_under_a_compiled_model():
    assert nonzero_counts(torch.compile(two_layers(), backend="eager")).keys() == {"0.weight", "0.bias", "1.weight"}


def test_more_elements_than_float32_can_count_are_counted_exactly():
    layer = nn.Linear(4097, 4097, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)[0, 0] = 0.0
    assert nonzero_counts(layer) == {"weight": 4097**2 - 1}


def test_rows_hold_kept_and_nonzero_weights_in_the_order_asked():
    masks = {"0.weight": torch.tensor([[True, True], [False, True]])}
    rows = sparsity_table(two_layers(), masks, ["1.weight", "0.weight"])
    assert rows == [
        LayerSparsity(name="1.weight", size=2, kept=2, nonzero=2),
        LayerSparsity(name="0.weight", size=4, kept=3, nonzero=2),
    ]
    assert [(row.sparsity, row.kept_zeros) for row in rows] == [(0.0, 0), (0.5, 1)]


def test_a_dense_phase_keeps_all_and_shows_its_zeros():
    (row,) = sparsity_table(two_layers(), {}, ["0.weight"])
    assert (row.kept, row.nonzero, row.sparsity) == (4, 2, 0.5)


def test_an_unknown_target_is_refused_with_the_nearest():
    with pytest.raises(TargetError, match=r"no parameter '0.weigth' .*did you mean '0.weight'"):
        sparsity_table(two_layers(), {}, ["0.weigth"])


def test_a_mask_of_another_shape_is_refused_by_name():
    with pytest.raises(StateError, match=r"mask of 1.weight has shape \(2,\), its weight \(1, 2\)"):
        sparsity_table(two_layers(), {"1.weight": torch.ones(2, dtype=torch.bool)}, ["1.weight"])
