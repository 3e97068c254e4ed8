"""Small data sets of every kind, and the helpers that compare batches."""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsetwin.data import Batch, DataSource, Splits

CPU = torch.device("cpu")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")


def noise(count: int, *, seed: int, side: int = 32) -> np.ndarray:
    """(count, side, side, 3) uint8; no two images are equal."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, *, kind: str = "PNG", **options: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_shards(
    folder: Path,
    split: str,
    images: Sequence[bytes | None],
    labels: Iterable[int],
    *,
    shards: int = 1,
    columns: tuple[str, str] = ("image", "label"),
    group_rows: int = 8,
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    kept = list(labels)
    paths = []
    for index, rows in enumerate(np.array_split(np.arange(len(kept)), shards)):
        structs = [{"bytes": images[row], "path": None} for row in rows]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {columns[0]: pa.array(structs, kind), columns[1]: pa.array([kept[row] for row in rows], pa.int64())}
        )
        paths.append(folder / f"{split}-{index:05d}-of-{shards:05d}.parquet")
        pq.write_table(table, paths[-1], row_group_size=group_rows)
    return paths


def write_cifar(
    folder: Path, *, classes: int = 10, per_class: int = 10, columns: tuple[str, str] = ("image", "label")
) -> Path:
    for split, count, shards, seed in (("train", per_class * classes, 3, 1), ("test", 2 * classes, 1, 2)):
        images = [encoded(pixels) for pixels in noise(count, seed=seed)]
        labels = np.random.default_rng(seed).permutation(np.arange(count) % classes)
        write_shards(folder, split, images, labels, shards=shards, columns=columns)
    return folder


def photographs(count: int, *, seed: int) -> list[bytes]:
    """JPEGs of different sizes and shapes, one in five of them grey."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        height, width = generator.integers(20, 60, 2)
        coarse = generator.integers(0, 256, (4, 5) if index % 5 == 0 else (4, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)))
        file = io.BytesIO()
        picture.save(file, "JPEG")
        made.append(file.getvalue())
    return made


def write_tree(folder: Path, *, classes: int = 3, train: int = 10, test: int = 3) -> Path:
    for split, count in (("train", train), ("val", test)):
        for label in range(classes):
            place = folder / split / f"n{label:03d}"
            place.mkdir(parents=True)
            for index, data in enumerate(photographs(count, seed=100 * label + len(split))):
                (place / f"{index}.JPEG").write_bytes(data)
    return folder


def write_photograph_shards(folder: Path, *, classes: int = 3) -> Path:
    for split, count, shards in (("train", 40, 2), ("validation", 7, 1)):
        labels = np.random.default_rng(count).permutation(np.arange(count) % classes)
        write_shards(folder, split, photographs(count, seed=count), labels, shards=shards, group_rows=5)
    return folder


def same(first: Iterable[Batch], second: Iterable[Batch]) -> bool:
    """Whether both hold the same batches, bit by bit."""
    pairs = list(zip(list(first), list(second), strict=True))
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def samples_of(batches: Iterable[Batch]) -> list[bytes]:
    """The inputs of all samples, as bytes that can be sorted and compared."""
    return [sample.numpy().tobytes() for inputs, _ in batches for sample in inputs]


Load = Callable[..., Splits]


def loader(source: DataSource, folder: Path | None) -> Load:
    """Return a short way to load a source."""

    def load(*, batch_size: int = 4, eval_batch_size: int = 5, seed: int = 1) -> Splits:
        return source.load(folder, batch_size=batch_size, eval_batch_size=eval_batch_size, seed=seed, device=CPU)

    return load


KINDS = ("digits", "cifar10", "cifar100", "imagenet-tree", "imagenet-shards", "chartext")
