"""How tensors and masks become the parts of a file and come back; `sparse_file` documents the format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint._safetensors import Entry, Reader, check_storable, count, row_major
from sparsetwin.errors import CheckpointError, StateError, nearest
from sparsetwin.masking import Masks, count_pruned_nonzero, pack_mask, unpack_mask

VERSION = 1
ENCODING = "bitmask"
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # of the same width: they carry every bit, also of a NaN
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Contents:
    """What a file's metadata says, checked against the tensors that it holds."""

    sparse: dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape of the dense tensor
    stored: tuple[str, ...]  # names of the tensors stored as they are
    shared: dict[str, str]  # name -> the name under which its tensor is stored
    card: dict[str, JSON]


def parts(name: str) -> tuple[str, str]:
    """Return the names of a sparse tensor's bits and values."""
    return f"{name}.bitmask", f"{name}.values"


def owners(tensors: Mapping[str, Tensor], masks: Masks) -> dict[str, str]:
    """Return, for every name, the one name under which its tensor is stored: tied tensors are the same memory."""
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: (name not in masks, name)):
        tensor = tensors[name]
        memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        found[name] = first.setdefault(memory if tensor.numel() else name, name)
    return found


def check_tensors(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Refuse tensors that cannot be stored and masks that do not fit them.

    Raises:
        StateError: Naming the tensor.
    """
    for name, tensor in tensors.items():
        check_storable(name, tensor)
    for name, mask in masks.items():
        if name not in tensors:
            raise StateError(f"there is a mask but no tensor of the name {name}{nearest(name, tensors)}")
        tensor = tensors[name]
        if mask.shape != tensor.shape or mask.dtype != torch.bool:
            found = f"{tuple(mask.shape)}, {mask.dtype}"
            raise StateError(f"the mask of {name} should be {tuple(tensor.shape)}, torch.bool; got {found}")
        if tensor.dtype not in _DTYPE_NAMES:
            raise StateError(f"{name} has a mask and dtype {tensor.dtype}; expected one of {', '.join(_DTYPES)}")
    for name, owner in owners(tensors, masks).items():
        if name in masks and not torch.equal(masks[name], masks[owner]):
            raise StateError(f"{name} and {owner} are one tensor with two different masks")


def encode(
    tensors: Mapping[str, Tensor], masks: Masks, card: Mapping[str, JSON]
) -> tuple[list[Entry], dict[str, JSON]]:
    """Return the parts of a file and its metadata.

    Raises:
        StateError: As `check_tensors` does, and if a pruned element is not zero.
    """
    check_tensors(tensors, masks)
    nonzero = count_pruned_nonzero(tensors, {name: mask.to(tensors[name].device) for name, mask in masks.items()})
    if nonzero:
        listed = ", ".join(f"{name} ({number})" for name, number in sorted(nonzero.items()))
        raise StateError(f"pruned elements that are not zero would be lost: {listed}; apply the masks before saving")
    owner_of = owners(tensors, masks)
    entries: list[Entry] = []
    sparse: dict[str, JSON] = {}
    for name in set(owner_of.values()):
        tensor = tensors[name]
        if name in masks:
            entries += _sparse_entries(name, tensor, masks[name])
            sparse[name] = {
                "encoding": ENCODING, "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)
            }  # fmt: skip
        else:
            entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), partial(row_major, tensor)))
    shared: dict[str, JSON] = {name: owner for name, owner in owner_of.items() if owner != name}
    return entries, {"version": VERSION, "sparse": sparse, "shared": shared, "card": dict(card)}


def parse(reader: Reader) -> Contents:
    """Return what the metadata says, when names, dtypes, shapes and sizes agree with the file's tensors.

    Raises:
        CheckpointError: If they do not, saying where, or the version is unknown.
    """
    version = reader.metadata.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(f"{reader.path} has format version {version!r}, this library reads version {VERSION}")
    sparse = {name: _sparse_layout(reader, name, layout) for name, layout in _object(reader, "sparse").items()}
    taken = {part for name in sparse for part in parts(name)}
    stored = tuple(name for name in reader.names if name not in taken)
    for name in stored:
        reader.layout(name)
        if name in sparse:
            raise CheckpointError(f"{reader.path}: {name} is stored both dense and sparse")
    shared: dict[str, str] = {}
    for name, owner in _object(reader, "shared").items():
        if name in sparse or name in stored or not isinstance(owner, str) or not (owner in sparse or owner in stored):
            raise CheckpointError(f"{reader.path}: {name} should share the tensor of {owner!r}, which cannot be")
        shared[name] = owner
    return Contents(sparse, stored, shared, _object(reader, "card"))


def decode_mask(reader: Reader, contents: Contents, name: str) -> Tensor:
    """Return the mask of a sparse tensor.

    Raises:
        CheckpointError: If its bits and its values do not agree.
    """
    _, shape = contents.sparse[name]
    bits, values = parts(name)
    try:
        mask = unpack_mask(reader.read(bits), shape=shape)
    except StateError as error:
        raise CheckpointError(f"{reader.path}: the bits of {name}: {error}") from error
    kept = count(reader.layout(values)[1])
    if int(mask.sum()) != kept:
        raise CheckpointError(f"{reader.path}: {name} has {kept} values, but its bits keep {int(mask.sum())}")
    return mask


def decode(reader: Reader, contents: Contents, masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in dense form, one at a time; tied ones one after the other.

    Args:
        reader: The open file.
        contents: What `parse` returned for it.
        masks: Masks that were decoded before; the others are decoded when needed.
    """
    names: dict[str, list[str]] = {name: [name] for name in sorted([*contents.stored, *contents.sparse])}
    for name in sorted(contents.shared):
        names[contents.shared[name]].append(name)
    for owner, group in names.items():
        if owner in contents.sparse:
            mask = masks[owner] if owner in masks else decode_mask(reader, contents, owner)
            dtype, shape = contents.sparse[owner]
            tensor = torch.zeros(shape, dtype=dtype)
            integers = _INTEGERS[dtype.itemsize]
            tensor.view(integers).view(-1)[mask.view(-1)] = reader.read(parts(owner)[1]).view(integers)
        else:
            tensor = reader.read(owner)
        for name in group:
            yield name, tensor


def _sparse_entries(name: str, tensor: Tensor, mask: Tensor) -> list[Entry]:
    bits, values = parts(name)
    return [
        Entry(bits, torch.uint8, ((tensor.numel() + 7) // 8,), lambda: pack_mask(mask)),
        Entry(values, tensor.dtype, (int(mask.sum()),), lambda: _kept_values(tensor, mask)),
    ]


def _kept_values(tensor: Tensor, mask: Tensor) -> Tensor:
    integers = row_major(tensor).view(_INTEGERS[tensor.itemsize])
    return integers.view(-1)[mask.cpu().reshape(-1)].view(tensor.dtype)


def _sparse_layout(reader: Reader, name: str, layout: JSON) -> tuple[torch.dtype, tuple[int, ...]]:
    where = f"{reader.path}: the sparse tensor {name}"
    if not isinstance(layout, dict):
        raise CheckpointError(f"{where} should have encoding, dtype and shape, got {layout!r}")
    if layout.get("encoding") != ENCODING:  # first, since another encoding may have other keys
        raise CheckpointError(f"{where} is encoded as {layout.get('encoding')!r}, this library reads {ENCODING!r}")
    if set(layout) != {"encoding", "dtype", "shape"}:
        raise CheckpointError(f"{where} should have encoding, dtype and shape, got {layout!r}")
    dtype = _DTYPES.get(str(layout["dtype"]))
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {layout['dtype']!r}; known: {', '.join(_DTYPES)}")
    shape = layout["shape"]
    if not isinstance(shape, list):
        raise CheckpointError(f"{where} has the shape {shape!r}, expected a list")
    sizes = tuple(size for size in shape if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63)
    if len(sizes) != len(shape):
        raise CheckpointError(f"{where} has the shape {shape!r}, expected whole numbers, 0 or more")
    missing = [part for part in parts(name) if part not in reader.names]
    if missing:
        raise CheckpointError(f"{where} lacks {' and '.join(missing)}")
    bits, values = (reader.layout(part) for part in parts(name))
    if bits != (torch.uint8, ((count(sizes) + 7) // 8,)) or values[0] != dtype or len(values[1]) != 1:
        raise CheckpointError(f"{where} of shape {list(sizes)} and {dtype} has bits {bits} and values {values}")
    return dtype, sizes


def _object(reader: Reader, key: str) -> dict[str, JSON]:
    value = reader.metadata.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{reader.path}: its metadata {key!r} should be a JSON object, got {value!r}")
    return value
