"""Random draws as pure functions of a key. Nothing here reads or moves a global random generator.

Draws are the raw 64-bit words of the Philox generator, whose key is a hash. NumPy promises that these words never
change, which it does not promise of permutations and distributions: splits stay fixed over versions.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsetwin.errors import DataError

Key = int | str


def words(count: int, *key: Key) -> NDArray[np.uint64]:
    """Return ``count`` independent uniform 64-bit words.

    >>> words(2, "example", 0) == words(3, "example", 0)[:2]
    array([ True,  True])

    Args:
        count: How many.
        *key: Says which words; other keys give independent ones.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def fractions(count: int, *key: Key) -> NDArray[np.float64]:
    """Return ``count`` independent numbers, uniform in [0, 1); the arguments are those of `words`."""
    return (words(count, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(stop: int, count: int, *key: Key) -> NDArray[np.int64]:
    """Return ``count`` independent integers, uniform in 0..stop-1, ``1 <= stop < 2**32``.

    A remainder of 64 random bits: no value is more likely than another by more than 2**-32.
    """
    return (words(count, *key) % np.uint64(stop)).astype(np.int64)


def permutation(count: int, *key: Key) -> NDArray[np.int64]:
    """Return 0..count-1 in a random order; the arguments are those of `words`."""
    return np.argsort(words(count, *key), kind="stable").astype(np.int64, copy=False)


def stratified(
    labels: NDArray[Any], fraction: float, *key: Key, blocks: NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the same fraction of every class at random.

    A larger fraction chooses a superset of what a smaller one does.

    >>> rest, chosen = stratified(np.array([0, 0, 1, 1]), 0.5, "example")
    >>> len(rest), len(chosen)
    (2, 2)

    Args:
        labels: (samples,), integers.
        fraction: In [0, 1); of n samples Python's ``round(fraction * n)`` are chosen. Where this does not divide,
            chance decides which classes give one more.
        *key: As in `words`.
        blocks: (samples,), integers. If given, samples are chosen from as few blocks as a random order of the blocks
            allows: those that lie together can be read together.

    Returns:
        The rest and the chosen, as ascending positions.

    Raises:
        DataError: If the fraction is outside [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise DataError(f"a part of the training set to hold out is a fraction in [0, 1), got {fraction!r}")
    rank = permutation(len(labels), *key)
    if blocks is not None:
        names, block = np.unique(blocks, return_inverse=True)
        rank = np.lexsort((rank, permutation(len(names), *key, "blocks")[block]))
    by_class = rank[np.argsort(labels[rank], kind="stable")]
    _, first, classes, sizes = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    depth = (np.arange(len(labels)) - first[classes] + 0.5) / sizes[classes]  # how far down its class a sample stands
    ranked = np.argsort(rank)[by_class]
    chosen = np.zeros(len(labels), dtype=np.bool_)
    chosen[by_class[np.lexsort((ranked, depth))[: round(fraction * len(labels))]]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
