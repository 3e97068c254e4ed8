"""One file for a sparse network: of every masked tensor only one bit a weight and the kept values.

The file is a safetensors file. A tensor ``w`` with a mask is two tensors in it: ``w.bitmask`` (uint8, one bit a
weight as `pack_mask` packs them) and ``w.values`` (1-D, ``w``'s dtype: the kept values in row-major order, also those
that happen to be zero). All others are stored under their own names, tied ones once. The metadata key ``sparsetwin``
holds JSON with sorted keys and no time, host or path, so that equal content gives equal bytes::

    {"version": 1,
     "sparse": {"w": {"encoding": "bitmask", "dtype": "float32", "shape": [64, 128]}},
     "shared": {"head.weight": "embedding.weight"},
     "card": {...},
     "crc32": {"w.bitmask": 1234, "w.values": 5678, "embedding.weight": 9012},
     "crc32_of_metadata": 3456}

``encoding`` says how one tensor is stored, so files may mix encodings. ``bitmask-float32``, ``bitmask-bfloat16`` and
``bitmask-float16`` hold values rounded to that dtype, ``bitmask-int8`` whole numbers and ``w.scales`` (float32, one a
slice of ``w`` along its first axis): a weight is value times scale. ``dtype`` stays the weight's own. A reader refuses
an encoding that it does not know by name. ``version`` rises only when a reader would otherwise misread what it does
know. ``docs/files.md`` spells the layout out to the byte.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from sparsetwin.checkpoint._atomic import put_in_place
from sparsetwin.checkpoint._encoding import check_tensors, decode, decode_mask, encode, owners
from sparsetwin.checkpoint._layout import Contents, parse
from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint._safetensors import Reader, open_file, write_file
from sparsetwin.checkpoint._values import Values, channels, narrowed
from sparsetwin.errors import CheckpointError
from sparsetwin.masking import Masks

_NO_CARD: Mapping[str, JSON] = MappingProxyType({})


@dataclass(frozen=True)
class SparseNetwork:
    """What a file holds: its tensors in dense form, the masks of those that were stored sparse, and its card."""

    tensors: dict[str, Tensor]  # as they were saved, on the CPU; tied tensors are one tensor under several names
    masks: Masks  # True keeps; empty for a dense network; a tied tensor's mask stands under one of its names
    card: dict[str, JSON]


@dataclass(frozen=True)
class SparseSize:
    """Bytes of a network's tensors in a file, without the header."""

    dense_target_bytes: int  # the masked tensors, if they were stored dense
    target_bytes: int  # the masked tensors as bit masks and kept values
    other_bytes: int  # all other tensors

    @property
    def fraction(self) -> float:
        """Size of the masked tensors relative to dense ones; 1 if there are none."""
        return self.target_bytes / self.dense_target_bytes if self.dense_target_bytes else 1.0


def save_sparse(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    masks: Masks,
    *,
    card: Mapping[str, JSON] = _NO_CARD,
    values: Values = "exact",
) -> str:
    """Write a network, its masked tensors as bit masks and kept values.

    Args:
        path: The file; it is replaced only when the new one is complete.
        tensors: Name -> tensor of any shape, such as a ``state_dict``; tied tensors are stored once.
        masks: Name -> bool of the tensor's shape, True keeps; float64, float32, float16 and bfloat16 tensors only.
        card: Plain data to keep with it; no time, host or path, if equal networks are to give equal bytes.
        values: How kept values are stored: ``exact`` is bit for bit; ``float32``, ``bfloat16`` and ``float16`` round
            to the nearest, ties to even, and never widen; ``int8`` rounds to whole multiples of one scale for each
            slice along the first axis, the slice's largest absolute value over 127. Zeros stay zero. Tensors without
            a mask are always exact.

    Returns:
        The file's sha256 in hexadecimal.

    Raises:
        StateError: If a pruned element is not zero, a mask does not fit its tensor, or a value is too large for the
            form asked for, such as 1e5 for float16.
        CheckpointError: If the disk is full or the file cannot be written; the previous file is kept.
    """
    written = write_file(Path(path), *encode(tensors, masks, card, values=values))
    put_in_place(written)
    return written.sha256


def save_dense(path: str | Path, tensors: Mapping[str, Tensor], *, card: Mapping[str, JSON] = _NO_CARD) -> str:
    """Write a network as it is: `save_sparse` without masks. Any safetensors tool reads the file.

    Returns:
        The file's sha256 in hexadecimal.

    Raises:
        StateError: If a tensor cannot be stored.
        CheckpointError: As `save_sparse` does.
    """
    return save_sparse(path, tensors, {}, card=card)


def load_sparse(path: str | Path, *, dtype: torch.dtype | None = None) -> SparseNetwork:
    """Read a file of `save_sparse` or `save_dense` as a whole; `SparseFile` reads one tensor at a time.

    Args:
        path: The file.
        dtype: What floating-point tensors are converted to; by default each has the dtype that it was saved from.

    Raises:
        CheckpointError: If the file is missing, truncated, corrupted, foreign or of an unknown version. Sizes are
            checked before memory is taken: never more than 64 times the file's, which float64 of one bit each is.
    """
    with _open(Path(path)) as (reader, contents):
        masks = {name: decode_mask(reader, contents, name) for name in contents.sparse}
        return SparseNetwork(dict(decode(reader, contents, masks, dtype=dtype)), masks, contents.card)


def load_masks(path: str | Path) -> Masks:
    """Read the masks of a file of either kind, and no tensor; a dense network has none.

    Raises:
        CheckpointError: As `load_sparse` does.
    """
    with _open(Path(path)) as (reader, contents):
        return {name: decode_mask(reader, contents, name) for name in contents.sparse}


def load_dense(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of `save_dense`.

    Raises:
        CheckpointError: As `load_sparse` does, and if tensors are stored sparse.
    """
    with _open(Path(path)) as (reader, contents):
        if contents.sparse:
            raise CheckpointError(f"{path} holds {len(contents.sparse)} sparse tensors; read it with load_sparse")
        return dict(decode(reader, contents, {}))


def iter_sparse(path: str | Path, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Read a file of either kind one dense tensor at a time, so that only one need be held.

    Args:
        path: The file.
        dtype: As for `load_sparse`.

    Yields:
        Name and tensor, sorted by name but for tied tensors: they come together.

    Raises:
        CheckpointError: As `load_sparse` does.
    """
    with _open(Path(path)) as (reader, contents):
        yield from decode(reader, contents, {}, dtype=dtype)


def read_card(path: str | Path) -> dict[str, JSON]:
    """Read the card of a file of either kind, and no tensor.

    Raises:
        CheckpointError: As `load_sparse` does, as far as the header shows it.
    """
    with _open(Path(path)) as (_, contents):
        return contents.card


def sparse_size(tensors: Mapping[str, Tensor], masks: Masks, *, values: Values = "exact") -> SparseSize:
    """Return how large a file of `save_sparse` gets, from shapes and masks alone; tied tensors count once.

    >>> import torch
    >>> weight, mask = torch.zeros(10, 80), torch.arange(800).reshape(10, 80) % 10 == 0
    >>> sparse_size({"w": weight}, {"w": mask})     # of 3200 bytes: 100 for the bits, 320 for the values
    SparseSize(dense_target_bytes=3200, target_bytes=420, other_bytes=0)
    >>> sparse_size({"w": weight}, {"w": mask}, values="int8").target_bytes     # 100 + 80 + ten scales
    220

    Raises:
        StateError: If a mask does not fit its tensor.
    """
    check_tensors(tensors, masks)
    stored = set(owners(tensors, masks).values())
    sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in stored}
    targets = stored & masks.keys()
    packed = sum(_packed_bytes(tensors[name], masks[name], values) for name in targets)
    return SparseSize(sum(sizes[n] for n in targets), packed, sum(sizes[n] for n in stored - targets))


def _packed_bytes(tensor: Tensor, mask: Tensor, values: Values) -> int:
    narrow = narrowed(values, tensor.dtype) or tensor.dtype
    scales = 4 * channels(tuple(tensor.shape)) if narrow is torch.int8 else 0
    return (tensor.numel() + 7) // 8 + int(mask.sum()) * narrow.itemsize + scales


@contextmanager
def _open(path: Path) -> Iterator[tuple[Reader, Contents]]:
    with open_file(path) as reader:
        yield reader, parse(reader)
