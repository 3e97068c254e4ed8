"""Image sets too large for memory: a tree of files, or Parquet shards that are read a row group at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsetwin.data._draws import Key, fractions, permutation
from sparsetwin.data._shards import Shard, read_images
from sparsetwin.errors import DataError

_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """One image as it is stored."""

    origin: str  # file, or row and file, for messages
    data: bytes | None  # None: the bytes are in the file that ``origin`` names


class Store(ABC):
    """Encoded images of one split and their labels."""

    labels: NDArray[np.int64]
    blocks: NDArray[np.int64] | None  # of each sample, the number of what is read together; None if it is read alone

    @abstractmethod
    def shuffled(self, positions: Positions, *key: Key, window: int) -> Positions:
        """Return positions in a random order that can be read in bounded memory.

        Args:
            positions: Of the samples to read.
            *key: Of the draws, as in `_draws.words`.
            window: Samples that may be in memory at a time, about.
        """

    @abstractmethod
    def fetch(self, positions: Positions) -> Iterator[Encoded]:
        """Yield the images at these positions in this order.

        Raises:
            DataError: If a file cannot be read.
        """


class FileTree(Store):
    """Files ``<class>/<name>``, classes being numbered in the order of their names."""

    blocks = None

    def __init__(self, folder: Path) -> None:
        self.names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        if not self.names:
            raise DataError(f"{folder} has no sub-folders; expected one a class, with its images")
        self._paths: list[str] = []
        counts = []
        for name in self.names:
            files = sorted(str(path) for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
            if not files:
                raise DataError(
                    f"{folder / name} has no images; expected files ending in {', '.join(sorted(_SUFFIXES))}"
                )
            self._paths += files
            counts.append(len(files))
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def shuffled(self, positions: Positions, *key: Key, window: int) -> Positions:
        """Return positions in any order, all equally likely: files are read one by one."""
        return positions[permutation(len(positions), *key)]

    def fetch(self, positions: Positions) -> Iterator[Encoded]:
        """Yield the paths, which whoever decodes them reads."""
        return (Encoded(self._paths[position], None) for position in positions)


class RowGroups(Store):
    """Rows of Parquet shards; a row group is the least that can be read."""

    blocks: NDArray[np.int64]

    def __init__(self, shards: Sequence[Shard], labels: NDArray[np.int64]) -> None:
        self.labels = labels
        self._groups = [(shard, group) for shard in shards for group in range(len(shard.rows))]
        sizes = [rows for shard in shards for rows in shard.rows]
        self._first = np.array([0, *accumulate(sizes)])[:-1]
        self.blocks = np.repeat(np.arange(len(sizes)), sizes)

    def shuffled(self, positions: Positions, *key: Key, window: int) -> Positions:
        """Return positions in an order in which at most ``window`` samples' row groups are in use at a time.

        Row groups come in a random order, and the samples of each are scattered uniformly over the next ``window``
        samples: that of rank r gets the key r + w * u with u uniform in [0, 1) and w row groups in a window, and the
        keys are sorted. A batch in mid-epoch thus mixes samples of w row groups, one at the ends of an epoch of fewer.
        As ranks are random, any sample may come anywhere in an epoch; only neighbours in a file stay within a window
        of each other. Files whose classes lie apart need a window of many row groups.
        """
        used, block = np.unique(self.blocks[positions], return_inverse=True)
        if not len(used):
            return positions
        rank = np.argsort(permutation(len(used), *key, "row groups"))
        groups = max(1, round(window * len(used) / len(positions)))
        keys = rank[block] + groups * fractions(len(positions), *key)
        return positions[np.argsort(keys, kind="stable")]

    def fetch(self, positions: Positions) -> Iterator[Encoded]:
        """Yield images, reading each row group once and keeping it from its first sample to its last."""
        blocks = self.blocks[positions]
        last = {int(block): index for index, block in enumerate(blocks)}
        held: dict[int, list[bytes]] = {}
        for index, (position, block) in enumerate(zip(positions, blocks, strict=True)):
            shard, group = self._groups[block]
            if block not in held:
                held[block] = read_images(shard, group)
            row = int(position - self._first[block])
            yield Encoded(f"row {row} of row group {group} of {shard.path}", held[block][row])
            if last[int(block)] == index:
                del held[block]
