from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import loader, samples_of

from sparsetwin.data import Digits
from sparsetwin.errors import DataError


@pytest.fixture(scope="module")
def plain():
    return loader(Digits(shift=0, drop_last=False), None)(batch_size=64, eval_batch_size=1000)


def labels_of(batches):
    return torch.cat([labels for _, labels in batches.epoch(0)])


def test_the_wheel_holds_the_1797_images_and_their_notice():
    folder = files("sparsetwin.data")
    with (folder / "digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert images.shape == (1797, 8, 8)
    assert (images.min(), images.max()) == (0, 16)
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len((folder / "digits.npz").read_bytes()) < 100_000
    notice = (folder / "digits.NOTICE").read_text(encoding="utf-8")
    assert all(word in notice for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "10.24432/C50P49"))


def test_the_split_is_fixed_and_stratified(plain):
    assert (plain.train.samples, plain.holdout.samples, plain.test.samples) == (1210, 134, 453)
    for batches, least in ((plain.train, 117), (plain.holdout, 13), (plain.test, 44)):
        counts = torch.bincount(labels_of(batches), minlength=10)
        assert least <= counts.min() <= counts.max() <= least + 6
    assert labels_of(plain.test)[:12].tolist() == [1, 2, 6, 8, 1, 8, 1, 9, 0, 5, 8, 9]
    assert labels_of(plain.holdout)[:12].tolist() == [2, 1, 9, 5, 2, 0, 3, 1, 2, 5, 4, 7]


def test_train_holdout_and_test_are_all_images_once(plain):
    every = [sample for batches in (plain.train, plain.holdout, plain.test) for sample in samples_of(batches.epoch(0))]
    assert len(every) == len(set(every)) == 1797


def test_training_and_holdout_images_have_mean_0_and_deviation_1(plain):
    images = torch.cat([inputs for batches in (plain.train, plain.holdout) for inputs, _ in batches.epoch(0)])
    assert images.shape == (1344, 1, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_a_shifted_digit_is_one_of_nine_neighbours(plain):
    load = loader(Digits(shift=1, drop_last=False), None)
    still, moved = (
        torch.cat([inputs for inputs, _ in batches.epoch(0)]) for batches in (plain.train, load(batch_size=64).train)
    )
    black = still.min()
    padded = torch.nn.functional.pad(still, (1, 1, 1, 1), value=black.item())
    neighbours = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    found = (neighbours == moved).flatten(2).all(2)  # (9, samples)
    assert found.any(0).all()
    assert found.sum(1) == pytest.approx(torch.full((9,), len(still) / 9), rel=0.35)


def test_a_folder_or_an_absurd_shift_is_refused():
    with pytest.raises(DataError, match="no folder"):
        loader(Digits(), Path("somewhere"))()
    with pytest.raises(DataError, match="shift"):
        loader(Digits(shift=8), None)()
