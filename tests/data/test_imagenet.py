import multiprocessing
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from data_sets import loader, photographs, same, samples_of, write_photograph_shards, write_shards, write_tree

from sparsetwin.data import ImageNet
from sparsetwin.data._shards import Shard
from sparsetwin.data._stores import RowGroups
from sparsetwin.errors import DataError

SMALL = {"size": 16, "resize": 18, "workers": 0, "holdout": 0.2, "shuffle_window": 15}


@pytest.fixture(params=["tree", "shards"])
def folder(request, tmp_path):
    return (write_tree if request.param == "tree" else write_photograph_shards)(tmp_path / request.param)


def load(folder, **fields):
    return loader(ImageNet(**{**SMALL, **fields}), folder)()


def test_two_workers_give_the_same_bits_as_none(folder):
    alone, together = (load(folder, workers=workers) for workers in (0, 2))
    for split in ("train", "holdout", "test"):
        assert same(getattr(alone, split).epoch(1), getattr(together, split).epoch(1))
    assert same(alone.train.epoch(1, start=3), together.train.epoch(1, start=3))


def test_a_reader_that_stops_in_mid_epoch_stops_its_workers(folder):
    train = load(folder, workers=2).train
    reader = train.epoch(0)
    first = next(reader)
    reader.close()
    assert same([first], list(train.epoch(0))[:1])


def test_a_sample_has_the_same_window_whatever_the_batch_size(folder):
    source = ImageNet(**SMALL, drop_last=False)
    small, large = (loader(source, folder)(batch_size=size).train for size in (1, 7))
    assert samples_of(small.epoch(3)) == samples_of(large.epoch(3))


def test_the_same_photographs_in_a_tree_and_in_shards_are_evaluated_alike(tmp_path):
    images, labels = photographs(12, seed=4), [index // 4 for index in range(12)]
    for split, place in (("train", "train"), ("validation", "val")):
        write_shards(tmp_path / "shards", split, images, labels, group_rows=5)
        for index, (data, label) in enumerate(zip(images, labels, strict=True)):
            (tmp_path / "tree" / place / str(label)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / place / str(label) / f"{index:02d}.JPEG").write_bytes(data)
    tree, shards = (load(tmp_path / name) for name in ("tree", "shards"))
    assert same(tree.test.epoch(0), shards.test.epoch(0))
    assert tree.classes == shards.classes == 3
    assert torch.equal(tree.example_input, shards.example_input)


def test_the_holdout_is_stratified(folder):
    labels = torch.cat([labels for _, labels in load(folder, holdout=0.3).holdout.epoch(0)])
    counts = torch.bincount(labels, minlength=3)
    assert counts.max() - counts.min() <= 1


def row_groups(groups: int, rows: int) -> RowGroups:
    shards = [Shard(None, "image", "label", (rows,) * groups, ())]
    return RowGroups(shards, np.zeros(groups * rows, dtype=np.int64))


@pytest.mark.parametrize("window", [1, 100, 640, 10_000])
def test_shuffling_row_groups_keeps_no_more_of_them_open_than_the_window_holds(window):
    store = row_groups(40, 16)
    order = store.shuffled(np.arange(640), 1, "order", 0, window=window)
    assert sorted(order) == list(range(640))
    blocks = store.blocks[order]
    first, last = ({}, {})
    for index, block in enumerate(blocks):
        first.setdefault(block, index)
        last[block] = index
    most = max(sum(first[b] <= index <= last[b] for b in first) for index in range(640))
    assert most <= max(1, round(window / 16)) + 1


def test_a_wide_window_mixes_far_samples_and_every_epoch_otherwise():
    store = row_groups(40, 16)
    orders = [store.shuffled(np.arange(640), 1, "order", epoch, window=320) for epoch in (0, 1)]
    assert (orders[0] != orders[1]).mean() > 0.9
    for start in range(128, 512, 64):  # a batch in the middle of the epoch comes from most of the 20 row groups
        assert len(set(store.blocks[orders[0][start : start + 64]])) > 12
    rank = np.argsort(orders[0])
    assert abs(np.corrcoef(rank[:-1], rank[1:])[0, 1]) < 0.9
    assert abs(np.corrcoef(np.arange(640), orders[0])[0, 1]) < 0.4


def test_a_holdout_of_shards_comes_from_few_row_groups(tmp_path):
    images = photographs(4, seed=1) * 50
    labels = np.random.default_rng(0).integers(0, 4, 200)
    write_shards(tmp_path, "train", images, labels, group_rows=10)
    write_shards(tmp_path, "validation", images[:8], labels[:8])
    holdout = load(tmp_path, holdout=0.1).holdout
    assert holdout.samples == 20
    assert len(set(holdout._store.blocks[holdout._positions])) <= 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_photograph_is_named(tmp_path, workers):
    write_tree(tmp_path)
    (tmp_path / "val" / "n001" / "2.JPEG").write_bytes(b"\xff\xd8 not a photograph")
    with pytest.raises(DataError, match=r"n001.2\.JPEG holds no whole image"):
        list(load(tmp_path, workers=workers).test.epoch(0))


def test_a_damaged_photograph_in_a_shard_is_named(tmp_path):
    write_photograph_shards(tmp_path)
    images = photographs(7, seed=7)
    images[6] = images[6][:100]
    write_shards(tmp_path, "validation", images, [0] * 7, group_rows=5)
    with pytest.raises(DataError, match=r"row 1 of row group 1 of .*validation-00000-of-00001.parquet holds no whole"):
        list(load(tmp_path).test.epoch(0))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_worker_that_dies_is_reported(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "val" / "n000" / "0.JPEG").unlink()
    os.mkfifo(tmp_path / "val" / "n000" / "0.JPEG")  # whoever reads it waits for ever
    test = load(tmp_path, workers=1).test
    before = set(multiprocessing.active_children())

    def kill_the_worker():
        while not (new := set(multiprocessing.active_children()) - before):
            time.sleep(0.05)
        time.sleep(0.5)
        new.pop().kill()

    killer = threading.Thread(target=kill_the_worker)
    killer.start()
    with pytest.raises(DataError, match=r"a worker that decodes images died .*fewer workers"):
        next(test.epoch(0))
    killer.join()


def test_trees_that_do_not_fit_are_refused(tmp_path):
    whole = write_tree(tmp_path / "whole")
    for damage, message in (
        (lambda folder: shutil.rmtree(folder / "val"), "holds train/ but no val/"),
        (lambda folder: shutil.rmtree(folder / "val" / "n002"), "only one of them has n002"),
        (lambda folder: [path.unlink() for path in (folder / "train" / "n001").iterdir()], "n001 has no images"),
        (lambda folder: [shutil.rmtree(path) for path in (folder / "val").iterdir()], "has no sub-folders"),
        (lambda folder: (folder / "train").rename(folder / "training"), "holds neither"),
    ):
        folder = shutil.copytree(whole, tmp_path / "damaged")
        damage(folder)
        with pytest.raises(DataError, match=message):
            load(folder)
        shutil.rmtree(folder)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    write_photograph_shards(tmp_path)
    validation = tmp_path / "validation-00000-of-00001.parquet"
    write_shards(tmp_path, "validation", photographs(2, seed=1), [0, 3])
    with pytest.raises(DataError, match="labels from 0 to 3; expected 0 to 2"):
        load(tmp_path)
    validation.unlink()
    with pytest.raises(DataError, match="no validation shard"):
        load(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"size": 0}, {"size": 20}, {"workers": -1}, {"shuffle_window": 0}], ids=lambda fields: next(iter(fields))
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, fields):
    with pytest.raises(DataError, match=next(iter(fields))):
        load(tmp_path, **fields)


def test_no_folder_is_refused():
    with pytest.raises(DataError, match="not downloaded"):
        load(None)
