"""ImageNet, or any set of photographs laid out like it, streamed from disk."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sparsetwin.data._base import DataSource, Splits
from sparsetwin.data._draws import stratified
from sparsetwin.data._normalisation import Normalisation
from sparsetwin.data._shards import find_shards, open_shard, read_labels
from sparsetwin.data._stores import FileTree, RowGroups, Store
from sparsetwin.data._streaming import Look, Shuffle, StreamedImages
from sparsetwin.errors import DataError

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_NOTICE = "ImageNet (ILSVRC 2012), O. Russakovsky et al., 2015; for non-commercial research, see image-net.org"


@dataclass(frozen=True, kw_only=True)
class ImageNet(DataSource):
    """ImageNet from a folder: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``, or Parquet shards of the hub.

    The validation images are the test split, as everywhere; the holdout is a part of the training images.
    """

    holdout: float = 0.01
    """Fraction of the training set that is held out to make choices."""
    augment: bool = True
    """Train on random windows, mirrored every other time; otherwise on the middle, as in evaluation."""
    size: int = 224
    """Height and width of what the network sees, in pixels."""
    resize: int = 256
    """Length of the shorter side before the middle is cut out for evaluation, in pixels."""
    workers: int = 4
    """Processes that decode images; 0 decodes in the process that trains."""
    shuffle_window: int = 8192
    """Images of Parquet shards that are in memory and mixed at a time; a tree of files is shuffled as a whole."""
    drop_last: bool = True
    """Leave out the last training batch of an epoch if it is not full."""

    def load(
        self, folder: Path | None, *, batch_size: int, eval_batch_size: int, seed: int, device: torch.device
    ) -> Splits:
        """List the images in ``folder``, which are read when batches are; see `DataSource.load`."""
        self._check()
        if folder is None:
            raise DataError("ImageNet is not downloaded by sparsetwin; give the folder that holds it")
        training, validation, classes = _stores(folder)
        kept, held = stratified(training.labels, self.holdout, "imagenet", "holdout", blocks=training.blocks)
        normalisation = Normalisation.per_channel(_MEAN, _DEVIATION, white=255, device=device)
        look = Look(size=self.size, resize=self.resize, normalisation=normalisation)
        shuffle = Shuffle(seed=seed, window=self.shuffle_window, augment=self.augment, drop_last=self.drop_last)
        everything = np.arange(len(validation.labels))
        first = StreamedImages(training, kept[:1], batch_size=1, look=look, workers=0)
        return Splits(
            train=StreamedImages(
                training, kept, batch_size=batch_size, look=look, workers=self.workers, shuffle=shuffle
            ),
            holdout=StreamedImages(training, held, batch_size=eval_batch_size, look=look, workers=self.workers),
            test=StreamedImages(validation, everything, batch_size=eval_batch_size, look=look, workers=self.workers),
            example_input=next(first.epoch(0))[0],
            classes=classes,
            notice=_NOTICE,
        )

    def _check(self) -> None:
        if find_spec("PIL") is None:
            raise DataError("images need Pillow: pip install 'sparsetwin[data]'")
        if not 0 < self.size <= self.resize:
            raise DataError(f"needs 0 < size <= resize, got size={self.size} and resize={self.resize}")
        if self.workers < 0 or self.shuffle_window < 1:
            raise DataError(f"needs workers >= 0 and shuffle_window >= 1, got {self.workers} and {self.shuffle_window}")


def _stores(folder: Path) -> tuple[Store, Store, int]:
    """Return training images, validation images and the number of classes."""
    if (folder / "train").is_dir():
        return _trees(folder)
    if any(path for place in (folder, folder / "data") for path in place.glob("train-*.parquet")):
        return _row_groups(folder)
    raise DataError(
        f"{folder} holds neither train/<class>/ and val/<class>/ nor Parquet shards such as "
        "train-00000-of-00294.parquet and validation-00000-of-00014.parquet"
    )


def _trees(folder: Path) -> tuple[Store, Store, int]:
    validation = next((folder / name for name in ("val", "validation") if (folder / name).is_dir()), None)
    if validation is None:
        raise DataError(f"{folder} holds train/ but no val/; expected val/<class>/ with the validation images")
    trees = FileTree(folder / "train"), FileTree(validation)
    different = sorted(set(trees[0].names) ^ set(trees[1].names))
    if different:
        shown = ", ".join(different[:5]) + (", ..." if len(different) > 5 else "")
        raise DataError(f"{folder / 'train'} and {validation} hold different classes; only one of them has {shown}")
    return *trees, len(trees[0].names)


def _row_groups(folder: Path) -> tuple[Store, Store, int]:
    stores: list[Store] = []
    classes: int | None = None
    for split in ("train", "validation"):
        shards = [open_shard(path) for path in find_shards(folder, split)]
        classes = classes or len(shards[0].names) or None
        labels = np.concatenate([read_labels(shard, classes=classes) for shard in shards])
        classes = classes or int(labels.max(initial=-1)) + 1
        stores.append(RowGroups(shards, labels))
    return stores[0], stores[1], classes or 0
