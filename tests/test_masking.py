"""Masking is selection: what is pruned becomes 0.0, what is kept keeps its bits. Masks pack to one bit a weight."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selection_cases import DTYPES, layers, transposed, values
from sparsetwin.errors import StateError
from sparsetwin.masking import (
    apply_masks_,
    count_kept,
    count_pruned_nonzero,
    expand_bits,
    keep_,
    pack_mask,
    unpack_mask,
)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor):
    return tensor.contiguous().view(BITS[tensor.itemsize])


def random_mask(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@settings(max_examples=150, deadline=None)
@given(layers(), st.integers(0, 2**31))
def test_masking_equals_torch_where_bit_for_bit(weights, seed):
    for weight in weights.values():
        mask = random_mask(weight.shape, seed)
        expected = torch.where(mask, weight, 0)
        assert keep_(weight, expand_bits(mask, dtype=weight.dtype)) is weight
        assert torch.equal(bits_of(weight), bits_of(expected))
        assert not weight[~mask].signbit().any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_bit_pattern_of_a_kept_weight_survives_and_no_pruned_one_does(dtype):
    patterns = np.random.default_rng(0).integers(0, 256, size=4096 * dtype.itemsize, dtype=np.uint8)
    weight = torch.from_numpy(patterns).view(dtype)
    if dtype.itemsize > 1:
        assert weight.isnan().any()
    before, mask = bits_of(weight).clone(), random_mask(weight.shape)
    keep_(weight, expand_bits(mask, dtype=dtype))
    assert torch.equal(bits_of(weight), torch.where(mask, before, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_infinity_and_negative_zero_are_set_to_zero_where_pruned(dtype):
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).tiny / 2, 1.0], dtype=dtype)
    keep_(weight, expand_bits(torch.zeros(6, dtype=torch.bool), dtype=dtype))
    assert (bits_of(weight) == 0).all()


def test_masking_a_view_leaves_the_rest_of_its_memory_alone():
    wide = torch.full((4, 6), 7.0)
    keep_(wide[:, ::2], expand_bits(torch.zeros(4, 3, dtype=torch.bool), dtype=torch.float32))
    assert torch.equal(wide, torch.tensor([0.0, 7.0] * 3).expand(4, 6))


def test_masking_a_parameter_is_seen_by_autograd_as_a_change():
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    keep_(weight, expand_bits(torch.tensor([True, False, True]), dtype=torch.float32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert weight.requires_grad
    assert weight.is_leaf


def test_bits_have_the_memory_format_of_their_mask():
    mask = transposed(random_mask((3, 5)))
    assert expand_bits(mask, dtype=torch.float16).stride() == mask.stride()


def test_bits_of_another_shape_or_width_are_refused():
    bits = expand_bits(torch.ones(3, dtype=torch.bool), dtype=torch.float32)
    with pytest.raises(StateError, match=r"shape \(2, 3\) and 32 bits .* cannot be masked by bits of shape \(3,\)"):
        keep_(torch.ones(2, 3), bits)
    with pytest.raises(StateError, match=r"shape \(3,\) and 16 bits an element .* shape \(3,\) and 32"):
        keep_(torch.ones(3, dtype=torch.float16), bits)
    with pytest.raises(StateError, match=r"dtype torch.complex128 cannot be masked; expected 8, 16, 32 or 64 bits"):
        expand_bits(torch.ones(3, dtype=torch.bool), dtype=torch.complex128)


def test_masks_are_applied_by_name_and_names_without_a_mask_are_left_alone():
    tensors = {"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(2)}
    apply_masks_(tensors, {"b": torch.tensor([True, False, True]), "a": torch.eye(2, dtype=torch.bool)})
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [[1, 0], [0, 1]],
        "b": [1, 0, 1],
        "c": [1, 1],
    }
    apply_masks_(tensors, {})
    assert tensors["c"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b", "the mask of b has shape (3,), its tensor: shape (2, 2)"),
        ("z", "the mask of z has shape (3,), its tensor: none"),
    ],
)
def test_a_mask_that_fits_no_tensor_is_refused_before_any_tensor_is_changed(name, message):
    tensors = {"a": torch.ones(2), "b": torch.ones(2, 2)}
    masks = {"a": torch.zeros(2, dtype=torch.bool), name: torch.ones(3, dtype=torch.bool)}
    for function in (apply_masks_, count_pruned_nonzero):
        with pytest.raises(StateError, match=re.escape(message)):
            function(tensors, masks)
    assert tensors["a"].tolist() == [1, 1]


def test_kept_weights_are_counted_over_all_masks():
    masks = {
        "a": torch.eye(3, dtype=torch.bool),
        "b": torch.zeros(4, dtype=torch.bool),
        "c": transposed(random_mask((9, 8))),
    }
    assert count_kept(masks) == 3 + int(masks["c"].sum())
    assert count_kept({}) == 0


def test_pruned_weights_that_are_not_zero_are_counted_by_name():
    tensors = {
        "nan": torch.tensor([torch.nan, 0.0, -0.0, 1e-45]),
        "clean": torch.tensor([0.0, 5.0]),
        "kept": torch.tensor([1.0, 2.0]),
    }
    masks = {
        "nan": torch.tensor([False, False, False, False]),
        "clean": torch.tensor([False, True]),
        "kept": torch.tensor([True, True]),
    }
    assert count_pruned_nonzero(tensors, masks) == {"nan": 2}
    apply_masks_(tensors, masks)
    assert count_pruned_nonzero(tensors, masks) == {}


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 2**31), st.booleans())
def test_a_mask_unpacks_to_what_was_packed(shape, seed, is_transposed):
    mask = random_mask(tuple(shape), seed)
    mask = transposed(mask) if is_transposed and mask.ndim else mask
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((mask.numel() + 7) // 8,)
    unpacked = unpack_mask(packed, shape=shape)
    assert unpacked.dtype == torch.bool
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, mask)


def test_packed_masks_are_row_major_with_the_lowest_bit_first():
    mask = torch.tensor([[True, False, False], [False, True, False], [True, True, True]])
    assert pack_mask(mask).tolist() == [0b11010001, 0b1]
    assert pack_mask(mask.T.contiguous().T).tolist() == [0b11010001, 0b1]


def test_an_unpacked_mask_can_be_written_to_without_changing_the_packed_one():
    packed = pack_mask(torch.ones(8, dtype=torch.bool))
    unpack_mask(packed, shape=(8,)).zero_()
    assert packed.tolist() == [255]


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), "a packed mask of shape (3, 3) has 2 bytes, got 1"),
        (torch.zeros(3, dtype=torch.uint8), "a packed mask of shape (3, 3) has 2 bytes, got 3"),
        (torch.tensor([255, 3], dtype=torch.uint8), "a packed mask of shape (3, 3) has bits beyond its 9 elements"),
        (torch.zeros(2, dtype=torch.int16), "a packed mask is of dtype torch.uint8, got torch.int16"),
    ],
)
def test_a_packed_mask_that_does_not_fit_its_shape_is_refused(packed, message):
    with pytest.raises(StateError, match=re.escape(message)):
        unpack_mask(packed, shape=(3, 3))


def test_the_values_drawn_for_these_tests_include_infinity_negative_zero_and_denormals():
    for dtype in DTYPES:
        drawn = torch.cat([values((100,), dtype, seed) for seed in range(20)])
        assert drawn.isinf().any()
        assert ((drawn == 0) & drawn.signbit()).any()
        assert ((drawn != 0) & (drawn.abs() < torch.finfo(dtype).tiny)).any()
