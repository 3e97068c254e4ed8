"""Parquet shards in the Hugging Face layout: finding all of them, and reading images and labels with checks.

A split lies in files named ``train-00000-of-00003.parquet``. A row holds an image, a struct of its encoded ``bytes``
and a ``path`` that is not used, and an integer label. Column names differ between data sets on the hub.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetwin.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
_SHARD = re.compile(r"(?P<split>[a-z]+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?\.parquet")


@dataclass(frozen=True)
class Shard:
    """One Parquet file with its checked columns."""

    path: Path
    image: str  # column
    label: str  # column
    rows: tuple[int, ...]  # of each row group
    names: tuple[str, ...]  # of the classes; empty if the file does not tell


@dataclass(frozen=True)
class Part:
    """Encoded images of one shard or download, all of them in memory."""

    origin: str  # for messages
    images: list[bytes]
    labels: NDArray[np.int64]


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return all shards of a split in order, from the folder itself or its ``data`` folder.

    Args:
        folder: Where to look.
        split: ``"train"``, ``"test"`` or ``"validation"``.

    Raises:
        DataError: If there is no shard, one of a set is missing, or there are two sets.
    """
    pattern = f"{split}-00000-of-00001.parquet"
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with Parquet shards such as {pattern}")
    for place in (folder, folder / "data"):
        found = [(match, path) for path in sorted(place.glob(f"{split}-*")) if (match := _SHARD.fullmatch(path.name))]
        if found:
            return _complete(place, split, [(int(m["index"]), int(m["count"]), path) for m, path in found])
    raise DataError(f"no {split} shard in {folder} or its data folder; expected files such as {pattern}")


def _complete(place: Path, split: str, found: list[tuple[int, int, Path]]) -> list[Path]:
    counts = sorted({count for _, count, _ in found})
    if len(counts) > 1 or len({index for index, _, _ in found}) < len(found):
        names = ", ".join(path.name for _, _, path in found)
        raise DataError(f"{place} holds more than one set of {split} shards ({names}); keep one of them")
    missing = sorted(set(range(counts[0])) - {index for index, _, _ in found})
    if missing:
        names = ", ".join(f"{split}-{index:05d}-of-{counts[0]:05d}.parquet" for index in missing)
        raise DataError(f"{place} lacks {len(missing)} of {counts[0]} {split} shards: {names}; copy them there")
    return [path for _, _, path in sorted(found)]


def open_shard(path: Path) -> Shard:
    """Read a shard's schema and sizes, and check its columns.

    Raises:
        DataError: If the file is no whole Parquet file, or has not the columns.
    """
    with _opened(path) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    wanted = (
        f"an image column ({' or '.join(IMAGE_COLUMNS)}) with bytes and a label column ({' or '.join(LABEL_COLUMNS)})"
    )
    if image is None or label is None:
        raise DataError(f"{path} has the columns {', '.join(schema.names)}; expected {wanted}")
    kinds = f"{image}: {schema.field(image).type}, {label}: {schema.field(label).type}"
    if "bytes: binary" not in kinds or not str(schema.field(label).type).startswith(("int", "uint")):
        raise DataError(f"{path} has the columns {kinds}; expected {wanted} of integers")
    return Shard(path, image, label, rows, _class_names(schema.metadata, label))


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def read_labels(shard: Shard, *, classes: int | None) -> NDArray[np.int64]:
    """Return a shard's labels without reading its images.

    Args:
        shard: From `open_shard`.
        classes: Labels must be in 0..classes-1; None if any label that is not negative will do.

    Raises:
        DataError: If a label is missing or out of range, or the file cannot be read.
    """
    with _opened(shard.path) as parquet:
        column = parquet.read(columns=[shard.label])[shard.label]
    if column.null_count:
        raise DataError(f"{shard.path} has {column.null_count} rows without a label")
    return checked_labels(column.to_numpy(), classes=classes, origin=str(shard.path))


def checked_labels(labels: NDArray[Any], *, classes: int | None, origin: str) -> NDArray[np.int64]:
    """Return labels as int64.

    Args:
        labels: Integers.
        classes: As in `read_labels`.
        origin: File or data set, for the message.

    Raises:
        DataError: If a label is out of range.
    """
    labels = labels.astype(np.int64)
    top = classes - 1 if classes is not None else np.iinfo(np.int64).max
    if len(labels) and not 0 <= labels.min() <= labels.max() <= top:
        wanted = f"0 to {top}" if classes is not None else "0 and more"
        raise DataError(f"{origin} has labels from {labels.min()} to {labels.max()}; expected {wanted}")
    return labels


def read_images(shard: Shard, group: int) -> list[bytes]:
    """Return the encoded images of one row group.

    Raises:
        DataError: If the file cannot be read, or a row has no bytes.
    """
    with _opened(shard.path) as parquet:
        column = parquet.read_row_group(group, columns=[f"{shard.image}.bytes"])[shard.image]
    encoded: list[bytes] = column.combine_chunks().field("bytes").to_pylist()
    if any(data is None for data in encoded):
        raise DataError(f"{shard.path} has rows without image bytes, only paths; expected the bytes within the file")
    return encoded


def read_part(shard: Shard, *, classes: int) -> "Part":
    """Return all of a shard; for sets that fit into memory.

    Args:
        shard: From `open_shard`.
        classes: Labels must be in 0..classes-1.

    Raises:
        DataError: As `read_labels` and `read_images`.
    """
    groups = range(len(shard.rows))
    images = [data for group in groups for data in read_images(shard, group)]
    return Part(str(shard.path), images, read_labels(shard, classes=classes))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file, and turn what goes wrong with it into a `DataError` that names it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet shards need pyarrow: pip install 'sparsetwin[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as parquet:
            yield parquet
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is no whole Parquet file ({error}); copy or download it again") from error
