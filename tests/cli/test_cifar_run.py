"""``cifar10-resnet20`` from Parquet shards, and what becomes of shards that are missing or corrupted."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Commands, events

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

SHORT = (
    "cifar10-resnet20", "--epochs", "3", "--schedule.warmup", "1", "--schedule.sparse", "1", "--schedule.dense", "1",
    "--schedule.final-dense", "1", "--schedule.final-sparse", "1", "--train.batch-size", "20", "--threads", "1",
    "--out", "run", "--dataset.cache", "cache",
)  # fmt: skip


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(cli: Commands) -> Path:
    """100 training and 20 test images of noise, in the layout of the hub."""
    folder = cli.folder / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 100), ("test", 20)):
        images = [png(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
        structs = pa.array(
            [{"bytes": image, "path": None} for image in images],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        table = pa.table({"image": structs, "label": pa.array([i % 10 for i in range(count)], pa.int64())})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_it_trains_resumes_and_evaluates_from_parquet_shards(cli: Commands, shards: Path) -> None:
    done = cli.run("train", *SHORT, "--data", "data", "--json")
    assert done.code == 0, done.err
    start: Any = events(cli.folder / "run")[0]
    assert sum(start["targets"].values()) == 270_896
    members: Any = done.json["members"]
    assert members["sparse"]["kept"] == 270_896 - round(0.9 * 270_896)
    assert cli.run("eval", "run", "--json").json["accuracy"] == members["sparse"]["accuracy"]
    moved = shards.rename(cli.folder / "moved")
    assert "is not a folder" in cli.run("eval", "run").error
    assert cli.run("eval", "run", "--data", moved).code == 0
    assert cli.run("resume", "run").code == 0  # to verify it takes no data


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupted"])
def test_a_damaged_shard_is_named_and_no_run_folder_is_left(cli: Commands, shards: Path, damage: str) -> None:
    shard = shards / "train-00000-of-00001.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3 : len(content) // 3 + 2000] = bytes(2000)
        shard.write_bytes(content)
    done = cli.run("train", *SHORT, "--data", "data")
    assert done.code == 1
    assert done.err.count("error:") == 1
    assert "train-00000" in done.error
    assert not (cli.folder / "run").exists()


def test_an_empty_or_too_large_part_of_the_data_is_refused(cli: Commands, shards: Path) -> None:
    for samples, message in ((0, "the training set has 100 images, got samples=0"), (101, "got samples=101"),
                             (10, "training samples do not fill one batch of 20")):  # fmt: skip
        done = cli.run("train", *SHORT, "--data", "data", "--dataset.samples", samples)
        assert done.code == 1
        assert message in done.error
        assert not (cli.folder / "run").exists()
