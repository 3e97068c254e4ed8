"""How much masks differ, by hand and against the paper's own formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetwin.errors import StateError
from sparsetwin.metrics import MaskChange, mask_change

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def masks(*bits):
    return {f"layer{index}": torch.tensor(layer, dtype=torch.bool) for index, layer in enumerate(bits)}


def test_counts_are_those_worked_out_by_hand():
    change = mask_change(masks([1, 1, 0, 0], [1, 0]), masks([1, 0, 1, 1], [1, 0]))
    assert change == MaskChange(size=6, kept_before=3, kept_now=4, kept_both=2)
    assert (change.hamming, change.new_kept, change.new_pruned) == (3, 2, 1)
    assert change.intersection_over_union == 2 / 5
    assert change.new_kept_share == 0.5
    assert change.paper_percentage == pytest.approx(100 * 4 / 6)


@given(PAIRS)
def test_the_percentage_is_the_published_formula(pairs):
    before, now = (torch.tensor(bits) for bits in zip(*pairs, strict=True))
    hamming = int((before != now).sum())
    zeros_before, zeros_now = int((~before).sum()), int((~now).sum())
    change = mask_change({"w": before}, {"w": now})
    assert change.hamming == hamming
    assert change.paper_percentage == pytest.approx((hamming - (zeros_now - zeros_before)) / len(pairs) * 100)


@given(PAIRS)
def test_swapping_the_masks_swaps_what_came_and_what_went(pairs):
    before, now = ({"w": torch.tensor(bits)} for bits in zip(*pairs, strict=True))
    there, back = mask_change(before, now), mask_change(now, before)
    assert (there.new_kept, there.new_pruned) == (back.new_pruned, back.new_kept)
    assert there.intersection_over_union == back.intersection_over_union


def test_equal_masks_do_not_change():
    change = mask_change(masks([1, 0, 1]), masks([1, 0, 1]))
    assert (change.hamming, change.intersection_over_union, change.new_kept_share, change.paper_percentage) == (
        0,
        1,
        0,
        0,
    )


@pytest.mark.parametrize("bits", [[], [[]], [[0, 0]], [[1, 1]]])
def test_nothing_pruned_nothing_kept_and_nothing_at_all_are_safe(bits):
    change = mask_change(masks(*bits), masks(*bits))
    assert (change.hamming, change.intersection_over_union, change.new_kept_share, change.paper_percentage) == (
        0,
        1,
        0,
        0,
    )


def test_disjoint_masks_share_nothing():
    change = mask_change(masks([1, 0]), masks([0, 1]))
    assert (change.intersection_over_union, change.new_kept_share, change.paper_percentage) == (0, 1, 100)


def test_a_mask_on_one_side_only_is_refused_by_name():
    with pytest.raises(StateError, match="only one side has: layer1"):
        mask_change(masks([1, 0]), masks([1, 0], [1]))


def test_a_dense_phase_cannot_be_compared_with_a_sparse_one():
    with pytest.raises(StateError, match="only one side has: layer0"):
        mask_change({}, masks([1, 0]))


def test_shapes_that_differ_are_refused_by_name():
    with pytest.raises(StateError, match=r"layer0 have the shapes \(2,\) and \(1, 2\)"):
        mask_change(masks([1, 0]), masks([[1, 0]]))
