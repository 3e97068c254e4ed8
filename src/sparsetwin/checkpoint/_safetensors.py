"""Writing safetensors files so that equal content gives equal bytes, and reading them with nothing trusted.

Tensors are written one at a time, so that no second copy of a model is held, and hashed on the way. Text of our own
stands under one metadata key: the format keeps no order among several.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsetwin.checkpoint._atomic import HashedWriter, Written, remove_stale, write_temporary
from sparsetwin.checkpoint._plain import JSON, dump_json, parse_json
from sparsetwin.errors import CheckpointError, StateError

METADATA_KEY = "sparsetwin"
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what the header says of it, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Length in the file."""
        return self.dtype.itemsize * count(self.shape)


def count(shape: Iterable[int]) -> int:
    """Return the number of elements of a shape, in Python's integers, which do not overflow."""
    product = 1
    for size in shape:
        product *= size
    return product


def check_storable(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that the file format has no place for.

    Raises:
        StateError: Naming it.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        kind = (
            f"{type(tensor).__name__} of layout {tensor.layout}" if isinstance(tensor, Tensor) else repr(type(tensor))
        )
        raise StateError(f"{name} is a {kind}; only plain tensors can be stored, gather or convert it first")
    if tensor.is_meta:
        raise StateError(f"{name} has no values: it is on the meta device")
    if tensor.dtype not in _CODES:
        raise StateError(f"{name} has dtype {tensor.dtype}, which safetensors files cannot hold")


def row_major(tensor: Tensor) -> Tensor:
    """Return a tensor's values as they lie in the file: in the CPU's memory, row-major."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def write_file(path: Path, entries: Iterable[Entry], metadata: Mapping[str, JSON]) -> Written:
    """Write a safetensors file beside ``path``; equal entries and metadata give equal bytes.

    Args:
        path: The name that it is to get.
        entries: Their order does not matter.
        metadata: Plain data, stored under the one key of this library.

    Raises:
        CheckpointError: As `write_temporary` does, and if the metadata is not plain data.
        StateError: If a name cannot be stored.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {METADATA_KEY: dump_json(dict(metadata), what="metadata")}}
    offset = 0
    for entry in ordered:
        if entry.name in header or not _is_text(entry.name):
            raise StateError(f"a tensor cannot be stored under the name {entry.name!r}: it is taken or not text")
        offsets = [offset, offset := offset + entry.bytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: HashedWriter) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = entry.make()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    remove_stale(path.parent, target=path.name)
    return write_temporary(path, write)


class Reader:
    """An open safetensors file of this library, its header checked against the file's size."""

    def __init__(self, path: Path, file: Any) -> None:
        self._file = file
        text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise CheckpointError(f"{path} was not written by this library: it has no metadata {METADATA_KEY!r}")
        metadata = parse_json(text, what=f"{path}: its metadata")
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{path}: its metadata is no JSON object")
        self.path = path
        self.metadata = metadata
        self.names = tuple(sorted(file.keys()))

    def layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return the dtype and the shape of a tensor without reading it."""
        part = self._file.get_slice(name)
        code = part.get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} has the dtype {code}, which this library cannot read")
        return _DTYPES[code], tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own, on the CPU."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.clone()


@contextmanager
def open_file(path: Path) -> Iterator[Reader]:
    """Open a file for reading its tensors one by one.

    Raises:
        CheckpointError: Inside the block too, if the file is missing, truncated, corrupted or foreign.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield Reader(path, file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError | StateError):
            raise
        raise CheckpointError(f"{path} is truncated, corrupted or no safetensors file: {error}") from error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name != "__metadata__"
