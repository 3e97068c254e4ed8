from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import CPU, encoded, loader, noise, samples_of, write_cifar, write_shards

from sparsetwin.data import Cifar10, Cifar100
from sparsetwin.data._hub import download
from sparsetwin.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def load(folder, *, batch_size=10, cls=Cifar10, **fields):
    return loader(cls(cache=folder / "cache", **fields), folder)(batch_size=batch_size)


def everything(batches):
    """Inputs and labels of a split, in the order of its epoch 0."""
    return [torch.cat(parts) for parts in zip(*batches.epoch(0), strict=True)]


def test_pixels_and_labels_are_those_of_the_files_in_their_order(folder):
    inputs, labels = everything(load(folder).test)
    pixels = noise(20, seed=2).transpose(0, 3, 1, 2).astype(np.float32) / 255
    mean, deviation = (
        np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (Cifar10.mean, Cifar10.deviation)
    )
    assert np.allclose(inputs, (pixels - mean) / deviation, atol=1e-6)
    assert labels.tolist() == np.random.default_rng(2).permutation(np.arange(20) % 10).tolist()


def test_the_holdout_is_stratified_and_the_same_for_every_seed(folder):
    held = load(folder, holdout=0.2).holdout
    assert torch.bincount(everything(held)[1]).tolist() == [2] * 10


def test_augmentation_moves_training_images_only(folder):
    moved, still = load(folder, augment=True), load(folder, augment=False)
    plain = set(samples_of(still.train.epoch(0)))
    assert len(set(samples_of(moved.train.epoch(0))) & plain) < 5
    assert plain == set(samples_of(still.train.epoch(1)))
    assert samples_of(moved.holdout.epoch(0)) == samples_of(still.holdout.epoch(0))


def test_only_the_first_images_are_used_when_asked(folder):
    first = load(folder, samples=40, augment=False, holdout=0.25)
    every = load(folder, augment=False, holdout=0.0)
    assert (first.train.samples, first.holdout.samples, first.test.samples) == (30, 10, 20)
    used = samples_of(first.train.epoch(0)) + samples_of(first.holdout.epoch(0))
    stored = noise(40, seed=1).transpose(0, 3, 1, 2)
    normalised = load(folder, augment=False).train._pixels.normalisation.apply(torch.from_numpy(stored))
    assert sorted(used) == sorted(samples_of([(normalised, None)]))
    assert set(used) < set(samples_of(every.train.epoch(0)))


def test_random_labels_replace_those_of_the_first_training_samples_only(folder):
    fields = {"augment": False, "drop_last": False, "holdout": 0.2}
    true, random = load(folder, **fields), load(folder, random_labels=50, **fields)
    assert [batch[0].equal(other[0]) for batch, other in zip(true.train.epoch(0), random.train.epoch(0), strict=True)]
    relabelled = Cifar10(random_labels=50, cache=folder / "cache", **fields).relabelled(
        folder, eval_batch_size=7, device=CPU
    )
    assert (relabelled.positions.diff() > 0).all()
    assert relabelled.batches.samples == len(relabelled.positions) == len(relabelled.true_labels) == 50
    labels_by_image = [
        dict(zip(samples_of(splits.train.epoch(0)), everything(splits.train)[1].tolist(), strict=True))
        for splits in (true, random)
    ]
    chosen = samples_of(relabelled.batches.epoch(0))
    assert [labels_by_image[0][image] for image in chosen] == relabelled.true_labels.tolist()
    assert [labels_by_image[1][image] for image in chosen] == everything(relabelled.batches)[1].tolist()
    differing = [image for image in labels_by_image[0] if labels_by_image[0][image] != labels_by_image[1][image]]
    assert set(differing) <= set(chosen)
    assert 35 < len(differing) < 50
    assert samples_of(true.holdout.epoch(0)) == samples_of(random.holdout.epoch(0))
    assert everything(true.holdout)[1].equal(everything(random.holdout)[1])
    stored = np.random.default_rng(1).permutation(np.arange(100) % 10)
    assert stored[relabelled.positions].tolist() == relabelled.true_labels.tolist()


@pytest.mark.parametrize("fields", [{"samples": 0}, {"samples": 101}, {"random_labels": -1}, {"random_labels": 91}])
def test_numbers_that_the_set_cannot_give_are_refused(folder, fields):
    with pytest.raises(DataError, match=next(iter(fields))):
        load(folder, **fields)


def test_a_set_with_the_labels_of_another_is_refused(tmp_path):
    write_shards(tmp_path, "train", [encoded(pixels) for pixels in noise(20, seed=1)], range(20))
    write_shards(tmp_path, "test", [encoded(pixels) for pixels in noise(20, seed=2)], range(20))
    assert load(tmp_path, cls=Cifar100).classes == 100
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet has labels from 0 to 19; expected 0 to 9"):
        load(tmp_path)


def test_a_shard_that_was_damaged_after_it_was_cached_is_still_found(tmp_path):
    write_cifar(tmp_path)
    load(tmp_path)
    shard = tmp_path / "train-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match="train-00001-of-00003"):
        load(tmp_path)


def test_a_download_reads_as_the_shards_do(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # both may have been imported before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    local = loader(Cifar10(hub=str(folder), cache=folder / "cache"), None)()
    assert samples_of(local.test.epoch(0)) == samples_of(load(folder).test.epoch(0))
    with pytest.raises(DataError, match=r"the download of nobody/nothing stopped .*can be repeated"):
        download("nobody/nothing", splits=("train",), classes=10)


@pytest.fixture(scope="module", params=["cifar10", pytest.param("cifar100", marks=pytest.mark.slow)])
def real(request, tmp_path_factory):
    if not (SHARED / request.param).is_dir():
        pytest.skip(f"the real images are not in {SHARED / request.param}")
    cls = {"cifar10": Cifar10, "cifar100": Cifar100}[request.param]
    source = cls(holdout=0.0, augment=False, drop_last=False, cache=tmp_path_factory.mktemp("cache"))
    return source, SHARED / request.param


def test_the_real_training_images_have_the_published_means_and_deviations(real):
    source, folder = real
    splits = source.load(folder, batch_size=5000, eval_batch_size=5000, seed=1, device=CPU)
    assert (splits.train.samples, splits.test.samples) == (50_000, 10_000)
    moments = torch.zeros(2, 3, dtype=torch.float64)
    for inputs, _ in splits.train.epoch(0):
        variance, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
        moments += torch.stack([mean, variance + mean**2]) / 10
    deviation = (moments[1] - moments[0] ** 2).sqrt() * torch.tensor(source.deviation)
    mean = moments[0] * torch.tensor(source.deviation) + torch.tensor(source.mean)
    assert mean.tolist() == pytest.approx(source.mean, abs=5e-4)
    assert deviation.tolist() == pytest.approx(source.deviation, abs=5e-4)
    for batches in (splits.train, splits.test):
        counts = torch.bincount(torch.cat([labels for _, labels in batches.epoch(0)]))
        assert counts.tolist() == [batches.samples // source.classes] * source.classes
