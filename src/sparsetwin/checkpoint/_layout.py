"""What the metadata of a sparse file says of its tensors, checked against what the file holds."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint._safetensors import Reader, count
from sparsetwin.checkpoint._values import channels
from sparsetwin.errors import CheckpointError

VERSION = 1
EXACT = "bitmask"
INT8 = "bitmask-int8"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NARROW = {
    "bitmask-float32": torch.float32,
    "bitmask-float16": torch.float16,
    "bitmask-bfloat16": torch.bfloat16,
    INT8: torch.int8,
}
_FIELDS = {"encoding", "dtype", "shape"}


@dataclass(frozen=True)
class Layout:
    """How one sparse tensor is stored."""

    dtype: torch.dtype  # of the dense tensor
    shape: tuple[int, ...]  # of the dense tensor
    encoding: str

    @property
    def value_dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        return _NARROW.get(self.encoding, self.dtype)

    @property
    def has_scales(self) -> bool:
        """Whether there is one scale a channel."""
        return self.encoding == INT8

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names of the file's tensors that store this one: bits, values, and scales if it has them."""
        bits, values, scales = part_names(name)
        return (bits, values, scales) if self.has_scales else (bits, values)

    def plain(self) -> dict[str, JSON]:
        """Return the layout as the metadata holds it."""
        return {"encoding": self.encoding, "dtype": DTYPE_NAMES[self.dtype], "shape": list(self.shape)}


@dataclass(frozen=True)
class Contents:
    """What a file's metadata says, checked against the tensors that it holds."""

    sparse: dict[str, Layout]  # name -> how it is stored
    stored: tuple[str, ...]  # names of the tensors stored as they are
    shared: dict[str, str]  # name -> the name under which its tensor is stored
    card: dict[str, JSON]

    def groups(self) -> dict[str, list[str]]:
        """Return, for each stored tensor, sorted by name, all names that it has."""
        names: dict[str, list[str]] = {name: [name] for name in sorted([*self.stored, *self.sparse])}
        for name in sorted(self.shared):
            names[self.shared[name]].append(name)
        return names


def part_names(name: str) -> tuple[str, str, str]:
    """Return the names of a sparse tensor's bits, values and scales."""
    return f"{name}.bitmask", f"{name}.values", f"{name}.scales"


def encoding_of(narrow: torch.dtype | None) -> str:
    """Return the encoding whose values have a dtype; None is the tensor's own."""
    return EXACT if narrow is None else next(name for name, dtype in _NARROW.items() if dtype == narrow)


def parse(reader: Reader) -> Contents:
    """Return what the metadata says, when names, dtypes, shapes and sizes agree with the file's tensors.

    Raises:
        CheckpointError: If they do not, saying where, or the version is unknown.
    """
    version = reader.metadata.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(f"{reader.path} has format version {version!r}, this library reads version {VERSION}")
    sparse = {name: _sparse_layout(reader, name, layout) for name, layout in _object(reader, "sparse").items()}
    taken = {part for name, layout in sparse.items() for part in layout.parts(name)}
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


def shape_of(sizes: Iterable[object]) -> tuple[int, ...] | None:
    """Return sizes as a shape, or None if one of them is no whole number that a tensor can have."""
    listed = list(sizes)
    found = [size for size in listed if isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63]
    return tuple(found) if len(found) == len(listed) else None


def _sparse_layout(reader: Reader, name: str, given: JSON) -> Layout:
    where = f"{reader.path}: the sparse tensor {name}"
    if not isinstance(given, dict):
        raise CheckpointError(f"{where} should have encoding, dtype and shape, got {given!r}")
    encoding = given.get("encoding")
    if not isinstance(encoding, str) or encoding not in (EXACT, *_NARROW):  # another encoding may have other keys
        known = ", ".join((EXACT, *_NARROW))
        raise CheckpointError(f"{where} is encoded as {encoding!r}, this library reads {known}")
    if set(given) != _FIELDS:
        raise CheckpointError(f"{where} should have encoding, dtype and shape, got {given!r}")
    dtype = DTYPES.get(str(given["dtype"]))
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {given['dtype']!r}; known: {', '.join(DTYPES)}")
    sizes = given["shape"]
    if not isinstance(sizes, list):
        raise CheckpointError(f"{where} has the shape {sizes!r}, expected a list")
    shape = shape_of(sizes)
    if shape is None:
        raise CheckpointError(f"{where} has the shape {sizes!r}, expected whole numbers, 0 or more")
    layout = Layout(dtype, shape, encoding)
    _check_parts(reader, name, layout, where)
    return layout


def _check_parts(reader: Reader, name: str, layout: Layout, where: str) -> None:
    missing = [part for part in layout.parts(name) if part not in reader.names]
    if missing:
        raise CheckpointError(f"{where} lacks {' and '.join(missing)}")
    bits, values, *scales = (reader.layout(part) for part in layout.parts(name))
    if (
        bits != (torch.uint8, ((count(layout.shape) + 7) // 8,))
        or values[0] != layout.value_dtype
        or len(values[1]) != 1
        or any(scale != (torch.float32, (channels(layout.shape),)) for scale in scales)
    ):
        found = f"bits {bits} and values {values}" + "".join(f" and scales {scale}" for scale in scales)
        raise CheckpointError(f"{where} of shape {list(layout.shape)} and {layout.dtype} has {found}")


def _object(reader: Reader, key: str) -> dict[str, JSON]:
    value = reader.metadata.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{reader.path}: its metadata {key!r} should be a JSON object, got {value!r}")
    return value
