import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetwin.data._draws import below, fractions, permutation, stratified, words
from sparsetwin.errors import DataError


def test_draws_are_the_same_for_ever():
    assert words(2, 1, "order", 0).tolist() == [18394297979296728088, 4935663038065679878]
    assert permutation(6, 1, "order", 0).tolist() == [1, 3, 4, 5, 2, 0]


def test_other_keys_give_other_draws():
    keys = [(1, 2), (12,), ("1", 2), (1, "2"), (2, 1), (1, 2, 0), (-1, 2), (2**70, 2)]
    assert len({words(1, *key)[0] for key in keys}) == len(keys)


def test_fractions_and_integers_are_uniform():
    values = fractions(100_000, "uniform")
    assert 0 <= values.min() <= values.max() < 1
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(np.full(10, 10_000), abs=400)
    assert np.bincount(below(9, 90_000, "integers")) == pytest.approx(np.full(9, 10_000), abs=400)


@given(st.integers(0, 200), st.integers())
def test_a_permutation_has_every_number_once(count, key):
    assert sorted(permutation(count, key)) == list(range(count))


@given(
    st.lists(st.integers(0, 4), max_size=60),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 7),
)
def test_a_stratified_choice_divides_every_class_alike(labels, fraction, block_rows):
    given_labels = np.array(labels, dtype=np.int64)
    for blocks in (None, np.arange(len(labels)) // block_rows):
        rest, chosen = stratified(given_labels, fraction, "test", blocks=blocks)
        assert sorted([*rest, *chosen]) == list(range(len(labels)))
        assert (np.diff(rest) > 0).all()
        assert (np.diff(chosen) > 0).all()
        assert len(chosen) == round(fraction * len(labels))
        for name in set(labels):
            assert abs((given_labels[chosen] == name).sum() - fraction * labels.count(name)) < 1.5


def test_small_classes_are_divided_too():
    labels = np.arange(300) % 100
    _, chosen = stratified(labels, 0.1, "test")
    assert len(chosen) == len(set(labels[chosen])) == 30
    assert np.ptp(labels[chosen]) > 50


def test_a_larger_choice_holds_a_smaller_one():
    labels = np.arange(1000) % 10
    small, large = (set(stratified(labels, fraction, "test")[1]) for fraction in (0.1, 0.3))
    assert small < large


def test_with_blocks_a_choice_comes_from_few_of_them():
    labels = np.random.default_rng(0).integers(0, 10, 10_000)
    blocks = np.arange(10_000) // 100
    scattered, together = (stratified(labels, 0.05, "test", blocks=given)[1] for given in (None, blocks))
    assert len(scattered) == len(together)
    assert len(set(blocks[scattered])) > 95
    assert len(set(blocks[together])) < 10


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction):
    with pytest.raises(DataError, match="fraction"):
        stratified(np.zeros(4, dtype=np.int64), fraction, "test")
