"""CIFAR-10 and CIFAR-100, from local Parquet shards or from the Hugging Face hub; all images lie on the device."""

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetwin.data._base import Batches, DataSource, Splits
from sparsetwin.data._decoding import cached, content_key, decode
from sparsetwin.data._draws import below, stratified
from sparsetwin.data._hub import download
from sparsetwin.data._in_memory import OrderedImages, Pixels, ShuffledImages
from sparsetwin.data._normalisation import Normalisation
from sparsetwin.data._shards import Part, find_shards, open_shard, read_part
from sparsetwin.errors import DataError

_SIDE = 32  # pixels
_PADDING = 4  # pixels


@dataclass(frozen=True)
class Relabelled:
    """The training samples whose labels `random_labels` replaced, for measuring what a network memorises."""

    positions: Tensor  # (samples,), int64: ascending positions in the training set as it is stored
    true_labels: Tensor  # (samples,), int64; a random label equals the true one for about one in ``classes``
    batches: Batches  # in the order of the positions, not augmented, with the random labels


@dataclass(frozen=True, kw_only=True)
class _Cifar(DataSource, ABC):
    """What CIFAR-10 and CIFAR-100 share: 50,000 training and 10,000 test images of 32 x 32 pixels."""

    classes: ClassVar[int]
    mean: ClassVar[tuple[float, float, float]]
    deviation: ClassVar[tuple[float, float, float]]
    notice: ClassVar[str]

    hub: str
    """Data set on the Hugging Face hub that is downloaded when no folder is given."""
    holdout: float = 0.1
    """Fraction of the training set that is held out to make choices."""
    augment: bool = True
    """Shift training images by up to 4 pixels and mirror every other one, at random."""
    samples: int | None = None
    """Use only the first of the training images, for short runs; the holdout is part of them."""
    random_labels: int = 0
    """Replace the labels of the first so many training samples, the holdout not counted, by random classes."""
    drop_last: bool = True
    """Leave out the last training batch of an epoch if it is not full."""
    cache: Path | None = None
    """Folder for the decoded images; by default sparsetwin in the user's cache folder."""

    def load(
        self, folder: Path | None, *, batch_size: int, eval_batch_size: int, seed: int, device: torch.device
    ) -> Splits:
        """Read Parquet shards from ``folder``, or download them; see `DataSource.load`."""
        training, test = self._read(folder)
        train, held = self._divided(training)
        padding = _PADDING if self.augment else 0
        pixels = self._pixels(train, device=device)
        return Splits(
            train=ShuffledImages(
                self._with_random_labels(pixels),
                batch_size=batch_size,
                seed=seed,
                drop_last=self.drop_last,
                padding=padding,
                flip=self.augment,
            ),
            holdout=OrderedImages(self._pixels(held, device=device), batch_size=eval_batch_size),
            test=OrderedImages(self._pixels(test, device=device), batch_size=eval_batch_size),
            example_input=pixels.at(slice(1)).normalised(),
            classes=self.classes,
            notice=self.notice,
        )

    def relabelled(self, folder: Path | None, *, eval_batch_size: int, device: torch.device) -> Relabelled:
        """Return the training samples that `load` gives random labels, with their true ones.

        Args:
            folder: As in `load`.
            eval_batch_size: Samples of a batch.
            device: Where tensors are put.

        Raises:
            DataError: As `load`.

        Source: Peste et al., 2021, arXiv 2106.12379, the experiment on memorisation.
        """
        train, _ = self._divided(self._read(folder)[0])
        pixels = self._pixels(train, device=device).at(slice(self.random_labels))
        return Relabelled(
            positions=torch.from_numpy(train.positions[: self.random_labels]).to(device),
            true_labels=pixels.labels,
            batches=OrderedImages(self._with_random_labels(pixels), batch_size=eval_batch_size),
        )

    def _read(self, folder: Path | None) -> tuple["_Images", "_Images"]:
        """Return the training and the test images, as they are stored."""
        if folder is None:
            parts = [[part] for part in download(self.hub, splits=("train", "test"), classes=self.classes)]
        else:
            shards = [find_shards(folder, split) for split in ("train", "test")]
            parts = [[read_part(open_shard(path), classes=self.classes) for path in paths] for paths in shards]
        together = parts[0] + parts[1]
        images = cached(self.cache, content_key(together), lambda: decode(together, side=_SIDE))
        count = sum(len(part.images) for part in parts[0])
        return _Images.of(parts[0], images[:count]), _Images.of(parts[1], images[count:])

    def _divided(self, training: "_Images") -> tuple["_Images", "_Images"]:
        """Return the samples to train on and the holdout."""
        available = len(training.labels)
        wanted = available if self.samples is None else self.samples
        if not 1 <= wanted <= available:
            raise DataError(f"the training set has {available} images, got samples={self.samples}")
        kept, held = stratified(training.labels[:wanted], self.holdout, "cifar", "holdout")
        if not 0 <= self.random_labels <= len(kept):
            raise DataError(f"{len(kept)} samples are trained on, got random_labels={self.random_labels}")
        return training.at(kept), training.at(held)

    def _pixels(self, images: "_Images", *, device: torch.device) -> Pixels:
        return Pixels(
            images=torch.from_numpy(images.pixels).to(device),
            labels=torch.from_numpy(images.labels).to(device),
            normalisation=Normalisation.per_channel(self.mean, self.deviation, white=255, device=device),
        )

    def _with_random_labels(self, pixels: Pixels) -> Pixels:
        """Replace the first labels; the same ones for every seed of a run, so that runs share one problem."""
        labels = pixels.labels.clone()
        drawn = below(self.classes, self.random_labels, "cifar", "random labels")
        labels[: self.random_labels] = torch.from_numpy(drawn).to(labels.device)
        return pixels.with_labels(labels)


@dataclass(frozen=True)
class _Images:
    """Decoded images on the host."""

    pixels: NDArray[np.uint8]  # (samples, 3, 32, 32)
    labels: NDArray[np.int64]  # (samples,)
    positions: NDArray[np.int64]  # (samples,): in the split as it is stored

    @classmethod
    def of(cls, parts: list[Part], pixels: NDArray[np.uint8]) -> "_Images":
        return cls(pixels, np.concatenate([part.labels for part in parts]), np.arange(len(pixels)))

    def at(self, chosen: NDArray[np.int64]) -> "_Images":
        return _Images(self.pixels[chosen], self.labels[chosen], self.positions[chosen])


@dataclass(frozen=True, kw_only=True)
class Cifar10(_Cifar):
    """CIFAR-10: small photographs of 10 classes."""

    classes: ClassVar[int] = 10
    mean: ClassVar[tuple[float, float, float]] = (0.4914, 0.4822, 0.4465)
    deviation: ClassVar[tuple[float, float, float]] = (0.2470, 0.2435, 0.2616)
    notice: ClassVar[str] = "CIFAR-10, A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"

    hub: str = "uoft-cs/cifar10"
    """Data set on the Hugging Face hub that is downloaded when no folder is given."""


@dataclass(frozen=True, kw_only=True)
class Cifar100(_Cifar):
    """CIFAR-100: small photographs of 100 classes, the fine labels."""

    classes: ClassVar[int] = 100
    # those of the paper's published code; measured: (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    mean: ClassVar[tuple[float, float, float]] = (0.5071, 0.4867, 0.4408)
    deviation: ClassVar[tuple[float, float, float]] = (0.2675, 0.2565, 0.2761)
    notice: ClassVar[str] = "CIFAR-100, A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"

    hub: str = "uoft-cs/cifar100"
    """Data set on the Hugging Face hub that is downloaded when no folder is given."""
