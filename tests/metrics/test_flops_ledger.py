"""Training FLOPs, added up over a run."""

import json

import pytest

from sparsetwin.errors import ConfigError, StateError
from sparsetwin.metrics import FlopsLedger, training_flops


def test_the_backward_pass_counts_twice_the_forward_pass():
    assert training_flops(7, 5) == 7 * 5 + 2 * 7 * 5


def test_half_an_alternating_run_at_sparsity_s_costs_the_mean_of_dense_and_sparse():
    ledger = FlopsLedger(1000)
    for epoch in range(10):
        ledger.add(1000 if epoch % 2 else 100, samples=50)
    assert ledger.ratio == 0.5 * (1 + 0.1)
    assert (ledger.samples, ledger.training_flops, ledger.dense_training_flops) == (500, 825_000, 1_500_000)


def test_sums_are_exact_beyond_64_bits():
    ledger = FlopsLedger(10**15 + 1)
    for _ in range(3):
        ledger.add(10**15 + 1, samples=10**9)
    assert ledger.training_flops == 9 * (10**15 + 1) * 10**9
    assert ledger.ratio == 1.0


def test_an_empty_ledger_has_ratio_one():
    assert FlopsLedger(5).ratio == 1.0


def test_a_saved_ledger_goes_on_as_an_uninterrupted_one():
    whole, first = FlopsLedger(100), FlopsLedger(100)
    for ledger in (whole, first):
        ledger.add(100, samples=3)
    second = FlopsLedger(100)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for ledger in (whole, second):
        ledger.add(10, samples=4)
    assert second.state_dict() == whole.state_dict()
    assert all(type(value) is int for value in whole.state_dict().values())


@pytest.mark.parametrize("change", [{"extra": 1}, {"dense_forward_flops": 99}])
def test_foreign_state_is_refused_and_changes_nothing(change):
    ledger = FlopsLedger(100)
    ledger.add(100, samples=3)
    before = ledger.state_dict()
    with pytest.raises(StateError, match="ledger"):
        ledger.load_state_dict(before | {"samples": 9} | change)
    assert ledger.state_dict() == before


def test_a_missing_field_is_refused():
    with pytest.raises(StateError, match="has the fields"):
        FlopsLedger(100).load_state_dict({"samples": 1})


@pytest.mark.parametrize(("flops", "samples"), [(-1, 1), (1, -1)])
def test_negative_numbers_are_refused(flops, samples):
    with pytest.raises(ConfigError, match="not negative"):
        FlopsLedger(100).add(flops, samples=samples)


def test_a_model_without_flops_is_refused():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        FlopsLedger(0)
