"""Patterns are values that refuse what cannot be, and layers and sparsities that do not fit are named."""

import dataclasses
import re

import pytest

from sparsetwin.errors import ConfigError, SelectionError
from sparsetwin.patterns import NM, Block, Channel, Unstructured, check_pattern, check_shapes, pattern_at

CONVOLUTION = {"conv": (16, 8, 3, 3)}


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2.0, 4), (2, 4.0), (True, 4), (1, 1)])
def test_nm_keeps_some_of_every_group_and_not_all(n, m):
    with pytest.raises(ConfigError, match=f"0 < n < m in whole numbers; got {n}:{m}"):
        NM(n, m)


@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (4, 0), (-4, 4), (2.5, 4), (4, True)])
def test_a_block_has_whole_rows_and_columns(rows, columns):
    with pytest.raises(ConfigError, match=f"got {rows} x {columns}"):
        Block(rows, columns)


@pytest.mark.parametrize("axis", [-1, 0.0, False, "out"])
def test_a_channel_axis_is_a_whole_number_from_zero(axis):
    with pytest.raises(ConfigError, match=re.escape(f"got {axis!r}")):
        Channel(axis)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 2, transposable=True), Block(2, 8), Channel(1)])
def test_a_pattern_is_a_frozen_value(pattern):
    assert pattern == dataclasses.replace(pattern)
    assert hash(pattern) == hash(dataclasses.replace(pattern))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.n = 1


@pytest.mark.parametrize(
    ("n", "m", "sparsity"), [(2, 4, 0.5), (1, 4, 0.75), (1, 3, 2 / 3), (1, 3, 1 - 1 / 3), (3, 4, 0.25)]
)
def test_the_sparsity_of_nm_is_accepted(n, m, sparsity):
    check_pattern(NM(n, m), {"fc": (12, 12)}, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.4999, 0.6, 0.9])
def test_another_sparsity_than_that_of_nm_is_refused_with_the_right_one(sparsity):
    with pytest.raises(
        ConfigError, match=re.escape(f"2:4 keeps 2 of every 4 weights, a sparsity of 0.5; got {sparsity}")
    ):
        check_pattern(NM(2, 4), {"fc": (12, 12)}, sparsity)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "kept"),
    [(NM(2, 4), 0.25, 3), (NM(2, 4), 0.5, 2), (NM(1, 8), 0.125, 7), (NM(1, 8), 0.875, 1), (NM(1, 3), 1 / 3, 2)],
)
@pytest.mark.parametrize("transposable", [False, True])
def test_nm_keeps_more_of_every_group_on_the_way_to_it(pattern, sparsity, kept, transposable):
    pattern = dataclasses.replace(pattern, transposable=transposable)
    if transposable and pattern.m > 4 and kept != pattern.n:
        with pytest.raises(ConfigError, match="a transposable pattern is pruned step by step for m up to 4 only"):
            pattern_at(pattern, sparsity)
    else:
        assert pattern_at(pattern, sparsity) == NM(kept, pattern.m, transposable)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "message"),
    [
        (NM(1, 4), 0.3, "got 0.3; phases on the way to it may have 0.25, 0.5, as schedules.grouped(schedule, m=4)"),
        (NM(2, 4), 0.75, "got 0.75; phases on the way to it may have 0.25, as"),
        (NM(2, 4), 1e-12, "got 1e-12; phases on the way"),
        (NM(1, 2), 0.25, "1:2 keeps 1 of every 2 weights, a sparsity of 0.5; got 0.25"),
    ],
)
def test_what_groups_cannot_have_is_refused_with_what_they_can(pattern, sparsity, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_pattern(pattern, {"fc": (12, 12)}, sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 8), Channel(1)])
def test_other_patterns_have_any_sparsity(pattern):
    assert pattern_at(pattern, 0.3721) == pattern


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (NM(2, 4), (16, 3, 3, 3), "has 3 input channels for each output, which groups of 4 do not divide"),
        (NM(2, 4), (16, 1, 3, 3), "1 input channel for each output, which groups of 4 do not divide"),
        (NM(2, 4), (16,), "1 input channel for each output"),
        (NM(2, 4), (), "1 input channel for each output"),
        (NM(2, 4, transposable=True), (10, 64), "has 10 outputs, which groups of 4 do not divide"),
        (Block(4, 2), (10, 64), "has 10 outputs, which groups of 4 do not divide"),
        (Block(2, 5), (10, 64), "has 64 input channels for each output, which groups of 5 do not divide"),
        (Channel(1), (10,), "has no axis 1"),
        (Channel(2), (10, 64), "has no axis 2"),
    ],
)
def test_a_layer_that_groups_do_not_divide_is_named_with_its_shape_and_what_leaves_it_out(pattern, shape, message):
    for check in (check_shapes, lambda *given: check_pattern(*given, getattr(pattern, "sparsity", 0.9))):
        with pytest.raises(SelectionError, match=re.escape(message)) as caught:
            check(pattern, {"fine": (64, 320, 3), "layer.weight": shape})
        assert f"layer.weight of shape {shape}" in str(caught.value)
        assert "exclude=('layer.weight',)" in str(caught.value)


def test_a_depthwise_convolution_is_pointed_to_its_own_exclusion():
    with pytest.raises(SelectionError, match="or dense_depthwise=True"):
        check_shapes(NM(2, 4), {"depthwise": (32, 1, 3, 3)})


@pytest.mark.parametrize(
    "pattern", [Unstructured(), NM(2, 4), NM(2, 4, transposable=True), Block(8, 8), Block(1, 1), Channel(0), Channel(3)]
)
def test_a_convolution_that_groups_divide_is_accepted(pattern):
    check_pattern(pattern, CONVOLUTION, 0.5)


def test_any_shape_is_unstructured_and_a_vector_is_a_column():
    check_pattern(Unstructured(), {"a": (), "b": (7,), "c": (16, 1, 3, 3)}, 0.97)
    check_pattern(Block(4, 1), {"a": (8,)}, 0.97)
    check_pattern(Channel(0), {"a": (8,)}, 0.97)
