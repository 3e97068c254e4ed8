"""Text by the character, from one file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetwin.data._base import Batch, Batches, DataSource, Splits, check_position, count_batches
from sparsetwin.data._draws import below
from sparsetwin.errors import DataError

_TEST_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class CharText(DataSource):
    """Next-character prediction on a text file, such as Tiny Shakespeare: the last tenth of it is the test split.

    Inputs are (batch, context) int64 character numbers, labels the same moved on by one character.
    """

    context: int = 128
    """Characters that the model sees at once."""
    holdout: float = 0.05
    """Fraction of the training text, at its end, that is held out to make choices."""
    samples: int | None = None
    """Random windows of one epoch; by default as many as fit side by side into the training text."""
    drop_last: bool = True
    """Leave out the last training batch of an epoch if it is not full."""

    def load(
        self, folder: Path | None, *, batch_size: int, eval_batch_size: int, seed: int, device: torch.device
    ) -> Splits:
        """Read ``input.txt`` in ``folder``, or ``folder`` itself if it is a file; see `DataSource.load`."""
        if self.context < 1 or not 0.0 <= self.holdout < 1.0:
            raise DataError(f"needs context >= 1 and holdout in [0, 1), got {self.context} and {self.holdout}")
        text = read_text(folder)
        known = vocabulary(text)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        numbers = np.searchsorted(np.array([ord(character) for character in known]), codes).astype(np.int32)
        tokens = torch.from_numpy(numbers).to(device)
        before_test = len(tokens) - round(_TEST_FRACTION * len(tokens))
        before_holdout = before_test - round(self.holdout * before_test)
        train, held, test = tokens[:before_holdout], tokens[before_holdout:before_test], tokens[before_test:]
        for name, part in (("training", train), ("holdout", held), ("test", test)):
            if len(part) <= self.context and not (name == "holdout" and self.holdout == 0):
                raise DataError(
                    f"the text has {len(text)} characters, {len(part)} of them in the {name} part; a context of "
                    f"{self.context} needs at least {self.context + 1} there"
                )
        samples = len(train) // self.context if self.samples is None else self.samples
        if samples < 1:
            raise DataError(f"an epoch needs at least one sample, got samples={self.samples}")
        return Splits(
            train=RandomWindows(
                train,
                context=self.context,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
                drop_last=self.drop_last,
            ),
            holdout=OrderedWindows(held, context=self.context, batch_size=eval_batch_size),
            test=OrderedWindows(test, context=self.context, batch_size=eval_batch_size),
            example_input=train[: self.context].long()[None],
            classes=len(known),
            notice=f"text of {len(text)} characters, {len(known)} different ones; licensed as that file is",
        )


def read_text(path: Path | None) -> str:
    """Return the text of a file, or of ``input.txt`` in a folder, every character as it stands.

    Raises:
        DataError: If there is no such file, or it is not UTF-8.
    """
    if path is None:
        raise DataError("text comes with no data; give a UTF-8 text file, or a folder that holds one named input.txt")
    file = path / "input.txt" if path.is_dir() else path
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror}); expected a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start} ({error.reason}); convert it to UTF-8") from error


def vocabulary(text: str) -> str:
    """Return the different characters of a text in ascending order; a character's number is its position there.

    >>> vocabulary("hello")
    'ehlo'
    """
    return "".join(sorted(set(text)))


class RandomWindows(Batches):
    """A training split: windows that start anywhere, other ones in every epoch."""

    def __init__(
        self, tokens: Tensor, *, context: int, samples: int, batch_size: int, seed: int, drop_last: bool
    ) -> None:
        self._tokens = tokens
        self._context = context
        self._given = samples
        self._batch_size = batch_size
        self._seed = seed
        self._length = count_batches(samples, batch_size, drop_last=drop_last)

    @property
    def samples(self) -> int:
        """Windows of an epoch, without those of a last batch that is left out."""
        return min(self._given, len(self) * self._batch_size)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield random windows; see `Batches.epoch`."""
        check_position(epoch, start, batches=len(self))
        return (self._batch(epoch, number) for number in range(start, len(self)))

    def _batch(self, epoch: int, number: int) -> Batch:
        count = min(self._batch_size, self.samples - number * self._batch_size)
        starts = below(len(self._tokens) - self._context, count, self._seed, "windows", epoch, number)
        return _windows(self._tokens, torch.from_numpy(starts), context=self._context)


class OrderedWindows(Batches):
    """A holdout or test split: windows side by side; characters after the last whole window are left out."""

    def __init__(self, tokens: Tensor, *, context: int, batch_size: int) -> None:
        self._tokens = tokens
        self._context = context
        self._batch_size = batch_size
        self._length = count_batches(self.samples, batch_size, drop_last=False)

    @property
    def samples(self) -> int:
        """Windows of the split."""
        return max(0, len(self._tokens) - 1) // self._context

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield windows in order; see `Batches.epoch`."""
        check_position(epoch, start, batches=len(self))
        return map(self._batch, range(start, len(self)))

    def _batch(self, number: int) -> Batch:
        first = number * self._batch_size
        windows = torch.arange(first, min(first + self._batch_size, self.samples))
        return _windows(self._tokens, windows * self._context, context=self._context)


def _windows(tokens: Tensor, starts: Tensor, *, context: int) -> Batch:
    """Return the characters of each window, and those one further on.

    Args:
        tokens: (characters,), integers.
        starts: (samples,), int64, on the host.
        context: Length of a window.
    """
    if tokens.is_cuda:
        starts = starts.pin_memory().to(tokens.device, non_blocking=True)
    within = starts[:, None] + torch.arange(context + 1, device=tokens.device)
    characters = tokens[within].long()
    return characters[:, :-1].contiguous(), characters[:, 1:].contiguous()
