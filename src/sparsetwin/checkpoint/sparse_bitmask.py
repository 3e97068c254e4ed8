"""The ``sparse-bitmask`` layout of compressed-tensors, which that library and its readers gave up in 2026.

A weight ``layer.weight`` of shape (..., columns) is four tensors of a safetensors file, without any metadata:

==================== ======= ==================================================================================
``layer.shape``       int64  the dense shape, (axes,)
``layer.compressed``  any    the kept values in row-major order, (kept,)
``layer.bitmask``     uint8  (..., ceil(columns / 8)): every row packed by itself, the lowest bit first
``layer.row_offsets`` int64  (...): for each row the number of values before it; summed along the first axis only
==================== ======= ==================================================================================

Its first releases wrote ``layer.weight.shape`` and so on; both are read. Everything else is stored as it is. The
layout knows no tied tensors and no weights of other names: those are stored dense, each under its own name.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsetwin.checkpoint._atomic import put_in_place
from sparsetwin.checkpoint._encoding import check_tensors, check_zeros, kept_values, scatter
from sparsetwin.checkpoint._layout import shape_of
from sparsetwin.checkpoint._safetensors import Entry, Reader, count, open_file, row_major, write_file
from sparsetwin.checkpoint.sparse_file import SparseNetwork, load_sparse, save_sparse
from sparsetwin.errors import CheckpointError
from sparsetwin.masking import Masks

_PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_SUFFIX = ".weight"
_MOST_AXES = 64  # that a tensor can have


def save_sparse_bitmask(path: str | Path, tensors: Mapping[str, Tensor], masks: Masks) -> str:
    """Write a network in the ``sparse-bitmask`` layout.

    Args:
        path: The file; it is replaced only when the new one is complete.
        tensors: Name -> tensor, such as a ``state_dict``.
        masks: Name -> bool of the tensor's shape, True keeps; kept zeros are stored. Masked tensors whose name does
            not end in ``.weight``, and those without axes, are stored dense.

    Returns:
        The file's sha256 in hexadecimal.

    Raises:
        StateError: If a pruned element is not zero, a mask does not fit, or two tensors get one name.
        CheckpointError: If the disk is full or the file cannot be written; the previous file is kept.
    """
    check_tensors(tensors, masks)
    check_zeros(tensors, masks)
    entries: list[Entry] = []
    for name, tensor in tensors.items():
        if name in masks and name.endswith(_SUFFIX) and tensor.ndim:
            entries += _entries(name.removesuffix(_SUFFIX), tensor, masks[name].cpu())
        else:
            entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), partial(row_major, tensor)))
    written = write_file(Path(path), entries, None)
    put_in_place(written)
    return written.sha256


def load_sparse_bitmask(path: str | Path) -> SparseNetwork:
    """Read a file in the ``sparse-bitmask`` layout.

    Returns:
        Its tensors in dense form, the masks of the weights that were stored sparse, and an empty card.

    Raises:
        CheckpointError: If the file is missing, truncated, corrupted, or holds no such weight. Sizes are checked
            before memory is taken.
    """
    with open_file(Path(path), foreign=True) as reader:
        prefixes = sorted({name.rpartition(".")[0] for name in reader.names if _is_part(name)})
        if not prefixes:
            raise CheckpointError(f"{path} holds no weight in the sparse-bitmask layout; expected tensors *.bitmask")
        tensors: dict[str, Tensor] = {}
        masks: Masks = {}
        for prefix in prefixes:
            name = prefix if prefix.endswith(_SUFFIX) else prefix + _SUFFIX
            if name in tensors or name in reader.names:
                raise CheckpointError(f"{path} holds {name} twice")
            tensors[name], masks[name] = _read(reader, prefix)
        taken = {f"{prefix}.{part}" for prefix in prefixes for part in _PARTS}
        tensors.update({name: reader.read(name) for name in reader.names if name not in taken})
        return SparseNetwork(dict(sorted(tensors.items())), masks, {})


def is_sparse_bitmask(path: str | Path) -> bool:
    """Whether a safetensors file holds a weight in the ``sparse-bitmask`` layout, and is none of `save_sparse`.

    Raises:
        CheckpointError: If the file is missing, truncated or no safetensors file.
    """
    with open_file(Path(path), foreign=True) as reader:
        return any(name.endswith(".compressed") and f"{name[:-10]}bitmask" in reader.names for name in reader.names)


def from_sparse_bitmask(source: str | Path, target: str | Path) -> str:
    """Write a ``sparse-bitmask`` file anew as a file of `save_sparse`, bit for bit, and return its sha256.

    Raises:
        CheckpointError: As `load_sparse_bitmask` does.
        StateError: If a weight is of a dtype that `save_sparse` does not mask, such as float8.
    """
    found = load_sparse_bitmask(source)
    return save_sparse(target, found.tensors, found.masks)


def to_sparse_bitmask(source: str | Path, target: str | Path) -> str:
    """Write a file of `save_sparse` anew in the ``sparse-bitmask`` layout, and return its sha256.

    Values of fewer bits are stored in the weight's own dtype; the card is lost.

    Raises:
        CheckpointError: As `load_sparse` does.
        StateError: As `save_sparse_bitmask` does.
    """
    found = load_sparse(source)
    return save_sparse_bitmask(target, found.tensors, found.masks)


def _is_part(name: str) -> bool:
    prefix, _, part = name.rpartition(".")
    return bool(prefix) and part in ("compressed", "bitmask")


def _entries(prefix: str, tensor: Tensor, mask: Tensor) -> list[Entry]:
    *rows, columns = tensor.shape
    return [
        Entry(f"{prefix}.shape", torch.int64, (tensor.ndim,), lambda: torch.tensor(tensor.shape, device="cpu")),
        Entry(f"{prefix}.compressed", tensor.dtype, (int(mask.sum()),), lambda: kept_values(tensor, mask)),
        Entry(f"{prefix}.bitmask", torch.uint8, (*rows, -(-columns // 8)), lambda: _pack_rows(mask)),
        Entry(f"{prefix}.row_offsets", torch.int64, tuple(rows), lambda: _offsets(mask)),
    ]


def _pack_rows(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.contiguous().numpy(), axis=-1, bitorder="little"))


def _offsets(mask: Tensor) -> Tensor:
    counts = mask.sum(-1)
    return counts.cumsum(0) - counts if counts.ndim else torch.zeros_like(counts)


def _read(reader: Reader, prefix: str) -> tuple[Tensor, Tensor]:
    """Return a weight and its mask."""
    where = f"{reader.path}: the weight {prefix}"
    missing = [part for part in _PARTS if f"{prefix}.{part}" not in reader.names]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; sparse-bitmask has {', '.join(_PARTS)}")
    shape = _shape(reader, prefix, where)
    bits, values, offsets = (reader.layout(f"{prefix}.{part}") for part in ("bitmask", "compressed", "row_offsets"))
    *rows, columns = shape
    packed_columns = -(-columns // 8)
    if (
        bits[0] != torch.uint8
        or count(bits[1]) != count(rows) * packed_columns
        or offsets[0] != torch.int64
        or count(offsets[1]) != count(rows)
        or len(values[1]) != 1
        or not values[0].is_floating_point
    ):
        raise CheckpointError(f"{where} of shape {list(shape)} has bits {bits}, values {values}, offsets {offsets}")
    mask = _unpack_rows(reader.read(f"{prefix}.bitmask"), shape, where)
    if int(mask.sum()) != values[1][0]:
        raise CheckpointError(f"{where} has {values[1][0]} values, but its bits keep {int(mask.sum())}")
    found, expected = reader.read(f"{prefix}.row_offsets").view(-1), mask.sum(-1).view(-1)
    running = expected.cumsum(0) - expected
    if not (torch.equal(found, _offsets(mask).reshape(-1)) or torch.equal(found, running)):
        raise CheckpointError(f"{where} has row_offsets that are not those of its bits")
    return scatter(reader.read(f"{prefix}.compressed"), mask), mask


def _shape(reader: Reader, prefix: str, where: str) -> tuple[int, ...]:
    dtype, axes = reader.layout(f"{prefix}.shape")
    if dtype != torch.int64 or len(axes) != 1 or not 1 <= axes[0] <= _MOST_AXES:
        raise CheckpointError(f"{where} has a shape of {dtype} {axes}, expected 1 to {_MOST_AXES} of torch.int64")
    sizes = reader.read(f"{prefix}.shape").tolist()
    shape = shape_of(sizes)
    if shape is None:
        raise CheckpointError(f"{where} has the shape {sizes}, expected whole numbers, 0 or more")
    return shape


def _unpack_rows(packed: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    *rows, columns = shape
    rows_in_all = count(rows)
    bits = np.unpackbits(packed.numpy().reshape(rows_in_all, -(-columns // 8)), axis=1, bitorder="little")
    if bits[:, columns:].any():
        raise CheckpointError(f"{where} has bits beyond its {columns} columns")
    return torch.from_numpy(bits[:, :columns].astype(np.bool_)).reshape(shape)
