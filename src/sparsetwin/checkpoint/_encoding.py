"""How tensors and masks become the parts of a file and come back; `sparse_file` documents the format."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from sparsetwin.checkpoint._layout import DTYPE_NAMES, DTYPES, VERSION, Contents, Layout, encoding_of, part_names
from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint._safetensors import Entry, Reader, check_storable, count, row_major
from sparsetwin.checkpoint._values import Values, channel_scales, channels, check_fits, narrowed, round_values, widen
from sparsetwin.errors import CheckpointError, StateError, nearest
from sparsetwin.masking import Masks, count_pruned_nonzero, pack_mask, unpack_mask

_INTEGERS = {
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.int8,
}  # of the same width: they carry every bit, also of a NaN


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
        if tensor.dtype not in DTYPE_NAMES:
            raise StateError(f"{name} has a mask and dtype {tensor.dtype}; expected one of {', '.join(DTYPES)}")
    for name, owner in owners(tensors, masks).items():
        if name in masks and not torch.equal(masks[name], masks[owner]):
            raise StateError(f"{name} and {owner} are one tensor with two different masks")


def check_zeros(tensors: Mapping[str, Tensor], masks: Masks) -> None:
    """Refuse weights that a file of kept values would lose.

    Raises:
        StateError: If a pruned element is not zero.
    """
    nonzero = count_pruned_nonzero(tensors, {name: mask.to(tensors[name].device) for name, mask in masks.items()})
    if nonzero:
        listed = ", ".join(f"{name} ({number})" for name, number in sorted(nonzero.items()))
        raise StateError(f"pruned elements that are not zero would be lost: {listed}; apply the masks before saving")


def encode(
    tensors: Mapping[str, Tensor], masks: Masks, card: Mapping[str, JSON], *, values: Values = "exact"
) -> tuple[list[Entry], dict[str, JSON]]:
    """Return the parts of a file and its metadata.

    Raises:
        StateError: As `check_tensors` and `check_zeros` do, and if a value is too large for the form asked for.
    """
    check_tensors(tensors, masks)
    check_zeros(tensors, masks)
    owner_of = owners(tensors, masks)
    entries: list[Entry] = []
    sparse: dict[str, JSON] = {}
    for name in set(owner_of.values()):
        tensor = tensors[name]
        if name in masks:
            check_fits(name, tensor, values)
            layout = Layout(tensor.dtype, tuple(tensor.shape), encoding_of(narrowed(values, tensor.dtype)))
            entries += _sparse_entries(name, tensor, masks[name], layout)
            sparse[name] = layout.plain()
        else:
            entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), partial(row_major, tensor)))
    shared: dict[str, JSON] = {name: owner for name, owner in owner_of.items() if owner != name}
    return entries, {"version": VERSION, "sparse": sparse, "shared": shared, "card": dict(card)}


def decode_mask(reader: Reader, contents: Contents, name: str) -> Tensor:
    """Return the mask of a sparse tensor.

    Raises:
        CheckpointError: If its bits and its values do not agree.
    """
    bits, values, _ = part_names(name)
    try:
        mask = unpack_mask(reader.read(bits), shape=contents.sparse[name].shape)
    except StateError as error:
        raise CheckpointError(f"{reader.path}: the bits of {name}: {error}") from error
    kept = count(reader.layout(values)[1])
    if int(mask.sum()) != kept:
        raise CheckpointError(f"{reader.path}: {name} has {kept} values, but its bits keep {int(mask.sum())}")
    return mask


def decode_one(
    reader: Reader, contents: Contents, name: str, *, mask: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return one stored tensor in dense form, in memory of its own.

    Args:
        reader: The open file.
        contents: What `parse` returned for it.
        name: One under which a tensor is stored.
        mask: Its mask, if that was decoded before.
        dtype: What a floating-point tensor is converted to; None leaves it its own.
    """
    if name not in contents.sparse:
        tensor = reader.read(name)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    layout = contents.sparse[name]
    mask = decode_mask(reader, contents, name) if mask is None else mask
    values = _widened(reader, name, layout, mask)
    if dtype is not None:
        values = values.to(dtype)
    return scatter(values, mask)


def decode(
    reader: Reader, contents: Contents, masks: Masks, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in dense form, one at a time; tied ones one after the other.

    Args:
        reader: The open file.
        contents: What `parse` returned for it.
        masks: Masks that were decoded before; the others are decoded when needed.
        dtype: What floating-point tensors are converted to; None leaves them their own.
    """
    for owner, group in contents.groups().items():
        tensor = decode_one(reader, contents, owner, mask=masks.get(owner), dtype=dtype)
        for name in group:
            yield name, tensor
        del tensor  # before the next one is made


def _widened(reader: Reader, name: str, layout: Layout, mask: Tensor) -> Tensor:
    """Return the kept values in the weight's own dtype."""
    _, values, scales = part_names(name)
    stored = reader.read(values)
    if stored.dtype == layout.dtype:
        return stored
    read_scales = reader.read(scales) if layout.has_scales else None
    return widen(stored, layout.dtype, scales=read_scales, counts=_counts(mask))


def _counts(mask: Tensor) -> Tensor:
    """Return how many weights each channel keeps."""
    rows = channels(tuple(mask.shape))
    return mask.reshape(rows, -1).sum(1) if mask.numel() else torch.zeros(rows, dtype=torch.int64, device=mask.device)


def _sparse_entries(name: str, tensor: Tensor, mask: Tensor, layout: Layout) -> list[Entry]:
    bits, values, scales = part_names(name)
    entries = [
        Entry(bits, torch.uint8, ((tensor.numel() + 7) // 8,), lambda: pack_mask(mask)),
        Entry(values, layout.value_dtype, (int(mask.sum()),), lambda: _values_of(tensor, mask, layout)),
    ]
    if layout.has_scales:
        rows = channels(layout.shape)
        entries.append(Entry(scales, torch.float32, (rows,), lambda: channel_scales(tensor)))
    return entries


def _values_of(tensor: Tensor, mask: Tensor, layout: Layout) -> Tensor:
    kept = kept_values(tensor, mask)
    if layout.value_dtype == layout.dtype:
        return kept
    scales = channel_scales(tensor) if layout.has_scales else None
    return round_values(kept, layout.value_dtype, scales=scales, counts=_counts(mask.cpu()))


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor of the mask's shape with the values where it keeps, bit for bit, and zeros elsewhere."""
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    integers = _INTEGERS[values.itemsize]
    dense.view(integers).view(-1).masked_scatter_(mask.view(-1), values.view(integers))
    return dense


def kept_values(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the kept elements bit for bit, row-major, on the CPU."""
    integers = row_major(tensor).view(_INTEGERS[tensor.itemsize])
    return integers.view(-1)[mask.cpu().reshape(-1)].view(tensor.dtype)
