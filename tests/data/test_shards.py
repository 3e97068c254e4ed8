import sys

import pytest
from data_sets import encoded, loader, noise, pa, pq, write_cifar, write_shards

from sparsetwin.data import Cifar10
from sparsetwin.data._shards import find_shards, open_shard, read_images, read_labels, read_part
from sparsetwin.errors import DataError

PICTURES = [encoded(pixels) for pixels in noise(20, seed=3)]
LABELS = [index % 10 for index in range(20)]


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, "train", PICTURES, LABELS, shards=3)


def test_shards_are_found_in_order_in_the_folder_or_its_data_folder(tmp_path):
    for place in (tmp_path / "a", tmp_path / "b" / "data"):
        written = write_shards(place, "train", PICTURES, LABELS, shards=3)
        (place / "train-notes.txt").write_text("not a shard")
        (place / "test-00000-of-00007.parquet").write_text("another split")
        assert find_shards(tmp_path / place.relative_to(tmp_path).parts[0], "train") == written


def test_shards_with_a_hash_in_their_name_are_found(tmp_path):
    (tmp_path / "train-00000-of-00001-0f3a.parquet").touch()
    assert [path.name for path in find_shards(tmp_path, "train")] == ["train-00000-of-00001-0f3a.parquet"]


def test_reading_a_shard_returns_what_was_written(shards):
    parts = [read_part(open_shard(path), classes=10) for path in shards]
    assert [data for part in parts for data in part.images] == PICTURES
    assert [label for part in parts for label in part.labels.tolist()] == LABELS
    assert read_images(open_shard(shards[0]), 0) == PICTURES[:7]
    assert [part.origin for part in parts] == [str(path) for path in shards]


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("img", "label")])
def test_both_spellings_of_the_columns_are_read(tmp_path, columns):
    [path] = write_shards(tmp_path, "train", PICTURES, LABELS, columns=columns)
    assert read_part(open_shard(path), classes=10).labels.tolist() == LABELS


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_shard_is_named(shards, tmp_path, lost):
    shards[lost].unlink()
    with pytest.raises(DataError, match=rf"lacks 1 of 3 train shards: train-0000{lost}-of-00003.parquet"):
        find_shards(tmp_path, "train")


def test_two_sets_of_shards_are_refused(shards, tmp_path):
    write_shards(tmp_path, "train", PICTURES, LABELS, shards=2)
    with pytest.raises(DataError, match=r"more than one set.*train-00000-of-00002.*train-00000-of-00003"):
        find_shards(tmp_path, "train")


def test_a_folder_without_shards_or_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="no train shard in"):
        find_shards(tmp_path, "train")
    with pytest.raises(DataError, match="is not a folder"):
        find_shards(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("keep", [0, 3, 0.3, 0.9, -1])
def test_a_truncated_shard_is_named(shards, keep):
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet is no whole Parquet file .*again"):
        read_part(open_shard(shards[1]), classes=10)


def test_a_shard_damaged_within_is_named(tmp_path):
    [path] = write_cifar(tmp_path).glob("test-*")
    table = pq.read_table(path)
    pq.write_table(table, path, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet is no whole Parquet file"):
        read_part(open_shard(path), classes=10)


def test_a_shard_without_the_columns_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    for columns in ({"picture": [b"x"], "label": [1]}, {"image": [b"x"]}, {"image": [b"x"], "label": [1]}):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=r"train-00000-of-00001.parquet has the columns .*expected an image column"):
            open_shard(path)


def test_labels_that_are_no_integers_are_refused(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": ""}], "label": ["cat"]}), path)
    with pytest.raises(DataError, match="label: string"):
        open_shard(path)


@pytest.mark.parametrize("wrong", [-1, 10])
def test_a_label_out_of_range_is_refused(tmp_path, wrong):
    [path] = write_shards(tmp_path, "train", PICTURES, [*LABELS[:-1], wrong])
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet has labels from .*expected 0 to 9"):
        read_labels(open_shard(path), classes=10)


def test_rows_without_a_label_or_without_bytes_are_refused(tmp_path):
    [path] = write_shards(tmp_path, "train", [*PICTURES[:-1], None], [*LABELS[:-1], None])
    with pytest.raises(DataError, match="1 rows without a label"):
        read_labels(open_shard(path), classes=10)
    with pytest.raises(DataError, match="without image bytes"):
        read_images(open_shard(path), 2)


@pytest.mark.parametrize("library", ["pyarrow", "PIL", "datasets"])
def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch, library):
    write_cifar(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r"pip install 'sparsetwin\[data\]'"):
        loader(Cifar10(cache=tmp_path / "cache"), None if library == "datasets" else tmp_path)()
