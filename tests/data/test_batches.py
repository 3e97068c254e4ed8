"""What every data source promises to a training loop."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_sets import CPU, KINDS, same, samples_of

from sparsetwin.data import SOURCES
from sparsetwin.errors import DataError, UsageError


def test_every_source_has_a_name_and_is_tested_here():
    assert {kind.partition("-")[0] for kind in KINDS} == set(SOURCES)


def test_importing_the_package_imports_no_optional_library():
    script = (
        "import sys, sparsetwin.data; "
        "print([name for name in ('pyarrow', 'PIL', 'datasets', 'torchvision', 'tyro') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_an_epoch_read_from_any_batch_goes_on_as_the_whole_one(make, kind):
    train = make(kind)().train
    whole = list(train.epoch(3))
    assert len(whole) == len(train) > 3
    for start in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert same(whole[start:], train.epoch(3, start=start))


def test_a_freshly_loaded_source_yields_the_same_batches(make, kind):
    assert same(make(kind)().train.epoch(2, start=1), make(kind)().train.epoch(2, start=1))


def test_epochs_and_seeds_differ_in_training(make, kind):
    train = make(kind)().train
    assert not same(train.epoch(0), train.epoch(1))
    assert not same(train.epoch(0), make(kind)(seed=2).train.epoch(0))


@pytest.mark.parametrize("split", ["holdout", "test"])
def test_holdout_and_test_are_the_same_in_every_epoch_and_for_every_seed(make, kind, split):
    first, second = (getattr(make(kind)(seed=seed), split) for seed in (1, 2))
    assert same(first.epoch(0), first.epoch(5))
    assert same(first.epoch(0), second.epoch(0))
    assert same(list(first.epoch(0))[1:], first.epoch(0, start=1))


def test_reading_leaves_the_global_generators_alone(make, kind):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
    splits = make(kind)()
    for batches in (splits.train, splits.holdout, splits.test):
        list(batches.epoch(0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tobytes(), random.getstate())


def test_the_state_of_the_global_generators_changes_no_batch(make, kind):
    train = make(kind)().train
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = list(train.epoch(0))
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    assert same(first, train.epoch(0))


def test_two_readers_of_one_split_do_not_disturb_each_other(make, kind):
    train = make(kind)().train
    pairs = list(zip(train.epoch(0), train.epoch(0), strict=True))
    assert same([a for a, _ in pairs], [b for _, b in pairs])


@pytest.mark.parametrize("split", ["train", "holdout", "test"])
def test_sizes_are_those_of_the_batches(make, kind, split):
    batches = getattr(make(kind)(), split)
    read = list(batches.epoch(0))
    assert len(read) == len(batches) > 0
    assert sum(len(labels) for _, labels in read) == batches.samples
    full = 4 if split == "train" else 5
    assert all(len(inputs) == len(labels) == full for inputs, labels in read[:-1])


def test_a_last_partial_training_batch_is_dropped_or_kept(make, kind):
    whole = make(kind)(batch_size=1).train.samples
    size = next(size for size in range(2, 20) if whole % size)
    assert make(kind)(batch_size=size).train.samples == whole // size * size
    kept = make(kind, drop_last=False)(batch_size=size).train
    assert (kept.samples, len(kept)) == (whole, whole // size + 1)
    assert [len(labels) for _, labels in kept.epoch(0)][-1] == whole % size


def test_without_a_holdout_it_has_no_batches_and_training_has_its_samples(make, kind):
    usual, without = make(kind)(batch_size=1), make(kind, holdout=0.0)(batch_size=1)
    assert (len(without.holdout), without.holdout.samples, list(without.holdout.epoch(0))) == (0, 0, [])
    assert same(usual.test.epoch(0), without.test.epoch(0))
    if kind != "chartext":  # whose windows do not add up
        assert without.train.samples == usual.train.samples + usual.holdout.samples


def test_inputs_and_labels_have_the_promised_types(make, kind):
    splits = make(kind)()
    assert splits.example_input.shape[0] == 1
    assert splits.notice
    for batches in (splits.train, splits.holdout, splits.test):
        for inputs, labels in batches.epoch(0):
            assert inputs.shape[1:] == splits.example_input.shape[1:]
            assert inputs.dtype == splits.example_input.dtype
            assert inputs.is_contiguous()
            assert labels.dtype == torch.int64
            assert 0 <= labels.min() <= labels.max() < splits.classes


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 10**6)])
@pytest.mark.parametrize("split", ["train", "holdout", "test"])
def test_a_position_that_does_not_exist_is_refused_at_once(make, kind, split, epoch, start):
    with pytest.raises(UsageError, match="epochs count from 0"):
        getattr(make(kind)(), split).epoch(epoch, start=start)


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_an_impossible_holdout_is_refused(make, kind, holdout):
    with pytest.raises(DataError, match=r"\[0, 1\)"):
        make(kind, holdout=holdout)()


def test_a_training_set_smaller_than_a_batch_is_refused(make, kind):
    with pytest.raises(DataError, match="do not fill one batch of 100000"):
        make(kind)(batch_size=100_000)
    with pytest.raises(DataError, match="at least one sample"):
        make(kind)(eval_batch_size=0)


@pytest.mark.parametrize("kind", ["digits", "cifar10", "imagenet-tree", "imagenet-shards"])
def test_an_epoch_has_every_training_sample_once_and_none_of_the_holdout(make, kind):
    plain = {"shift": 0} if kind == "digits" else {"augment": False}
    splits = make(kind, drop_last=False, **plain)()
    everything = make(kind, holdout=0.0, drop_last=False, **plain)()
    trained, held = samples_of(splits.train.epoch(7)), samples_of(splits.holdout.epoch(0))
    assert len(set(trained)) == len(trained)
    assert not set(trained) & set(held)
    assert sorted(trained + held) == sorted(samples_of(everything.train.epoch(0)))
    assert not set(trained + held) & set(samples_of(splits.test.epoch(0)))


@pytest.mark.parametrize("kind", ["cifar10", "imagenet-tree", "chartext"])
def test_data_that_are_not_there_are_missed_by_name(kind, tmp_path):
    source = SOURCES[kind.partition("-")[0]]()
    with pytest.raises(DataError, match="nowhere"):
        source.load(tmp_path / "nowhere", batch_size=4, eval_batch_size=4, seed=1, device=CPU)
