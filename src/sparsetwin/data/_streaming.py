"""Batches of photographs that worker processes read, decode and cut while the network trains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsetwin.data._base import Batch, Batches, check_position, count_batches
from sparsetwin.data._crops import DRAWS, random_resized_crop, resized_center_crop
from sparsetwin.data._decoding import open_rgb
from sparsetwin.data._draws import fractions
from sparsetwin.data._normalisation import Normalisation
from sparsetwin.data._stores import Encoded, Positions, Store
from sparsetwin.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a photograph becomes an input."""

    size: int  # height and width that the network sees, in pixels
    resize: int  # length of the shorter side before the middle is cut out, in pixels
    normalisation: Normalisation


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """That a split is for training: shuffled, and augmented if asked."""

    seed: int
    window: int  # samples; see `Store.shuffled`
    augment: bool
    drop_last: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch, as it is sent to a worker: all that its result depends on."""

    images: Sequence[Encoded]
    labels: Tensor
    size: int
    resize: int
    crops: Sequence[tuple[int, str, int, int]] | None  # keys of each sample's draws; None cuts out the middle


class StreamedImages(Batches):
    """One split of an image set that is too large for memory."""

    def __init__(
        self,
        store: Store,
        positions: Positions,
        *,
        batch_size: int,
        look: Look,
        workers: int,
        shuffle: Shuffle | None = None,
    ) -> None:
        self._store = store
        self._positions = positions
        self._batch_size = batch_size
        self._look = look
        self._workers = workers
        self._shuffle = shuffle
        drop_last = shuffle is not None and shuffle.drop_last
        self._length = count_batches(len(positions), batch_size, drop_last=drop_last)

    @property
    def samples(self) -> int:
        """Samples of an epoch, without those of a last batch that is left out."""
        return min(len(self._positions), len(self) * self._batch_size)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield decoded batches, the same for any number of workers; see `Batches.epoch`."""
        check_position(epoch, start, batches=len(self))
        return self._read(epoch, start)

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        if start == len(self):
            return
        device = self._look.normalisation.device
        loader = DataLoader(
            _Decoder(),
            batch_size=None,
            sampler=_Requests(self, epoch, start),
            num_workers=self._workers,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        try:
            for decoded in loader:
                if isinstance(decoded, str):
                    raise DataError(decoded)
                images, labels = decoded
                yield self._look.normalisation.apply(images), labels.to(device, non_blocking=True)
        except RuntimeError as error:
            if isinstance(error, DataError) or "worker" not in str(error):
                raise
            raise DataError(f"a worker that decodes images died ({error}); try fewer workers") from error

    def requests(self, epoch: int, start: int) -> Iterator[Request]:
        """Yield what the workers are to do for the batches from ``start``; reads Parquet files, decodes nothing."""
        shuffle, order = self._shuffle, self._positions
        if shuffle is not None:
            order = self._store.shuffled(order, shuffle.seed, "order", epoch, window=shuffle.window)
        order = order[start * self._batch_size : self.samples]
        images = self._store.fetch(order)
        for first in range(0, len(order), self._batch_size):
            positions = order[first : first + self._batch_size]
            augmented = shuffle is not None and shuffle.augment
            yield Request(
                images=list(islice(images, len(positions))),
                labels=torch.from_numpy(self._store.labels[positions]),
                size=self._look.size,
                resize=self._look.resize,
                crops=[(shuffle.seed, "crop", epoch, int(p)) for p in positions] if shuffle and augmented else None,
            )


class _Requests:
    """What a `DataLoader` takes for a sampler."""

    def __init__(self, batches: StreamedImages, epoch: int, start: int) -> None:
        self._batches = batches
        self._position = epoch, start

    def __iter__(self) -> Iterator[Request]:
        return self._batches.requests(*self._position)


class _Decoder(Dataset[tuple[Tensor, Tensor] | str]):
    """Work on a request; what goes wrong is returned as a message, as a traceback of another process helps nobody."""

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor] | str:
        decoded = np.empty((len(request.images), request.size, request.size, 3), dtype=np.uint8)
        for index, encoded in enumerate(request.images):
            try:
                data = Path(encoded.origin).read_bytes() if encoded.data is None else encoded.data
                image = open_rgb(data)
                if request.crops is None:
                    square = resized_center_crop(image, resize=request.resize, size=request.size)
                else:
                    draws = fractions(DRAWS, *request.crops[index])
                    square = random_resized_crop(image, draws, size=request.size)
            except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
                return f"{encoded.origin} holds no whole image ({error}); get it again"
            decoded[index] = np.asarray(square)
        return torch.from_numpy(np.ascontiguousarray(decoded.transpose(0, 3, 1, 2))), request.labels


def _unchanged(decoded: Any) -> Any:
    return decoded
