"""What a training loop sees of a data set: three splits of batches that can be read again from any position."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsetwin.errors import DataError, UsageError

Batch = tuple[Tensor, Tensor]
"""Inputs and labels, both on the device."""


class Batches(ABC):
    """One split of a data set, cut into batches.

    Batch ``k`` of an epoch is a pure function of the seed, the epoch and ``k``: reading it draws nothing from the
    global random generators of torch, numpy or Python, so a run resumes in mid-epoch without a replay.
    """

    @property
    @abstractmethod
    def samples(self) -> int:
        """Samples that one epoch yields."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches of one epoch."""

    @abstractmethod
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches ``start``, ``start + 1``, ... of an epoch, the same ones whenever it is called.

        Args:
            epoch: Number of the epoch, from 0; a split that is neither shuffled nor augmented ignores it.
            start: First batch to yield, 0 <= start <= len(self).

        Raises:
            UsageError: If ``epoch`` or ``start`` is out of range.
        """


@dataclass(frozen=True)
class Splits:
    """A data set, ready to train on."""

    train: Batches
    holdout: Batches
    """Part of the training set that no weight is trained on and that makes every choice; may have no batches."""
    test: Batches
    """Read once, at the end."""
    example_input: Tensor
    """(1, ...): one sample as the model sees it, on the device."""
    classes: int
    notice: str
    """Origin and licence of the data, in one line."""


class DataSource(ABC):
    """Where data come from. Final classes are frozen dataclasses; their fields are what a user may override."""

    @abstractmethod
    def load(
        self, folder: Path | None, *, batch_size: int, eval_batch_size: int, seed: int, device: torch.device
    ) -> Splits:
        """Read the data and cut them into splits, the same ones for every seed.

        Args:
            folder: Where the data lie; None for a source that brings or downloads them.
            batch_size: Samples of a training batch.
            eval_batch_size: Samples of a holdout or test batch; the last one may be smaller.
            seed: Of the order and the augmentation of the training split, and of nothing else.
            device: Where batches are put.

        Raises:
            DataError: If the data are missing, corrupted or of another shape.
        """


def count_batches(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Return how many batches an epoch has.

    >>> count_batches(10, 4, drop_last=True), count_batches(10, 4, drop_last=False)
    (2, 3)

    Args:
        samples: In the split.
        batch_size: Samples of a batch.
        drop_last: Whether a last batch that is not full is left out.

    Raises:
        DataError: If ``batch_size`` is less than 1, or there are samples but not enough for a single batch.
    """
    if batch_size < 1:
        raise DataError(f"a batch needs at least one sample, got a batch size of {batch_size}")
    if drop_last and 0 < samples < batch_size:
        raise DataError(
            f"{samples} training samples do not fill one batch of {batch_size}; use a batch size of {samples} or less, "
            "or keep the last partial batch (drop_last=False)"
        )
    return samples // batch_size if drop_last else -(-samples // batch_size)


def check_position(epoch: int, start: int, *, batches: int) -> None:
    """Refuse a position that an epoch does not have.

    Raises:
        UsageError: If ``epoch`` is negative, or ``start`` is not in 0..``batches``.
    """
    if epoch < 0 or not 0 <= start <= batches:
        raise UsageError(
            f"epochs count from 0 and this split has batches 0 to {batches}, got epoch {epoch}, start {start}"
        )
