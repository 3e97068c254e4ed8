"""Batches of small images that all lie on the device as bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsetwin.data._base import Batch, Batches, check_position, count_batches
from sparsetwin.data._draws import Key, below, permutation
from sparsetwin.data._normalisation import Normalisation

Positions = NDArray[np.int64] | Tensor | slice


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Images of one split, all on one device."""

    images: Tensor  # (samples, channels, height, width), uint8
    labels: Tensor  # (samples,), int64
    normalisation: Normalisation  # on the same device

    def at(self, positions: Positions) -> "Pixels":
        """Return the images at these positions (a slice, or integers on the host or the device), in their order."""
        chosen = torch.from_numpy(positions).to(self.labels.device) if isinstance(positions, np.ndarray) else positions
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def with_labels(self, labels: Tensor) -> "Pixels":
        """Return the same images with other labels."""
        return replace(self, labels=labels)

    def normalised(self) -> Tensor:
        """Return the images as the model sees them."""
        return self.normalisation.apply(self.images)


def shifted(images: Tensor, *key: Key, padding: int, flip: bool) -> Tensor:
    """Move every image by up to ``padding`` pixels in both directions, and mirror every other one.

    The same as padding with black, cutting a random window of the old size and flipping it with probability 1/2.

    Args:
        images: (samples, channels, height, width).
        *key: Of the draws, as in `_draws.words`.
        padding: Largest shift in pixels; every shift is equally likely.
        flip: Whether to mirror left and right.
    """
    samples, channels, height, width = images.shape
    top, left = (below(2 * padding + 1, samples, *key, side) for side in ("top", "left"))
    mirrored = below(2, samples, *key, "flip") if flip else np.zeros(samples, dtype=np.int64)
    draws = torch.from_numpy(np.stack([top, left, mirrored]))
    if images.is_cuda:
        draws = draws.pin_memory().to(images.device, non_blocking=True)
    across = torch.arange(width, device=images.device)
    columns = torch.where(draws[2, :, None].bool(), across.flip(0), across) + draws[1, :, None]
    rows = torch.arange(height, device=images.device) + draws[0, :, None]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    stride = width + 2 * padding
    window = (rows[:, :, None] * stride + columns[:, None, :]).reshape(samples, 1, -1)
    moved = padded.reshape(samples, channels, -1).gather(2, window.expand(-1, channels, -1))
    return moved.reshape(images.shape)


class OrderedImages(Batches):
    """All images in their order, not augmented: a holdout or a test split."""

    def __init__(self, pixels: Pixels, *, batch_size: int) -> None:
        self._pixels = pixels
        self._batch_size = batch_size
        self._length = count_batches(len(pixels.labels), batch_size, drop_last=False)

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return len(self._pixels.labels)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield batches in order; see `Batches.epoch`."""
        check_position(epoch, start, batches=len(self))
        return map(self._batch, range(start, len(self)))

    def _batch(self, number: int) -> Batch:
        where = slice(number * self._batch_size, (number + 1) * self._batch_size)
        chosen = self._pixels.at(where)
        return chosen.normalised(), chosen.labels


class ShuffledImages(Batches):
    """A training split: a new order and new shifts in every epoch."""

    def __init__(
        self, pixels: Pixels, *, batch_size: int, seed: int, drop_last: bool, padding: int = 0, flip: bool = False
    ) -> None:
        self._pixels = pixels
        self._batch_size = batch_size
        self._seed = seed
        self._padding = padding
        self._flip = flip
        self._length = count_batches(len(pixels.labels), batch_size, drop_last=drop_last)

    @property
    def samples(self) -> int:
        """Samples of an epoch, without those of a last batch that is left out."""
        return min(len(self._pixels.labels), len(self) * self._batch_size)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield shuffled and augmented batches; see `Batches.epoch`."""
        check_position(epoch, start, batches=len(self))
        return self._read(epoch, start)

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        order = permutation(len(self._pixels.labels), self._seed, "order", epoch)
        positions = torch.from_numpy(order).to(self._pixels.labels.device)
        for number in range(start, len(self)):
            chosen = self._pixels.at(positions[number * self._batch_size : (number + 1) * self._batch_size])
            if self._padding or self._flip:
                key = (self._seed, "augment", epoch, number)
                images = shifted(chosen.images, *key, padding=self._padding, flip=self._flip)
                chosen = replace(chosen, images=images)
            yield chosen.normalised(), chosen.labels
