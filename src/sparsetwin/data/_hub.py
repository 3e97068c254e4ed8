"""Image data sets from the Hugging Face hub, by name."""

from typing import Any

import numpy as np

from sparsetwin.data._shards import IMAGE_COLUMNS, LABEL_COLUMNS, Part, checked_labels
from sparsetwin.errors import DataError


def download(name: str, *, splits: tuple[str, ...], classes: int) -> list[Part]:
    """Return the encoded images and labels of each split, downloaded unless the hub's own cache holds them.

    The `datasets` library writes downloads aside and moves them into its cache when they are whole, so one that stops
    leaves nothing half-written. It is tried once.

    Args:
        name: Of the data set on the hub, such as ``"uoft-cs/cifar10"``.
        splits: Names of the splits.
        classes: Labels must be in 0..classes-1.

    Raises:
        DataError: If `datasets` is missing, the download fails or stops, or the data are of another shape.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("a download needs datasets: pip install 'sparsetwin[data]'; or give a data folder") from error
    try:
        found = datasets.load_dataset(name, download_config=datasets.DownloadConfig(max_retries=1))
    except Exception as error:  # whatever a network, a disk or a hub can do
        raise DataError(
            f"the download of {name} stopped ({type(error).__name__}: {error}); nothing is half-written and it can be "
            "repeated; or give a folder that holds the Parquet shards"
        ) from error
    missing = [split for split in splits if split not in found]
    if missing:
        raise DataError(f"{name} has the splits {', '.join(found)}; expected {', '.join(splits)}")
    return [_part(found[split], f"{name} ({split})", datasets.Image(decode=False), classes) for split in splits]


def _part(rows: Any, origin: str, encoded: Any, classes: int) -> Part:
    image = next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)
    label = next((name for name in LABEL_COLUMNS if name in rows.column_names), None)
    if image is None or label is None:
        wanted = f"{' or '.join(IMAGE_COLUMNS)} and {' or '.join(LABEL_COLUMNS)}"
        raise DataError(f"{origin} has the columns {', '.join(rows.column_names)}; expected {wanted}")
    images = [row["bytes"] for row in rows.cast_column(image, encoded)[image]]
    if any(data is None for data in images):
        raise DataError(f"{origin} has rows without image bytes; expected the bytes within the data set")
    labels = checked_labels(np.asarray(list(rows[label])), classes=classes, origin=origin)
    return Part(origin, images, labels)
