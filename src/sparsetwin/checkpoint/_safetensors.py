"""Writing safetensors files so that equal content gives equal bytes, and reading them with nothing trusted.

Tensors are written one at a time, so that no second copy of a model is held, and hashed on the way. Text of our own
stands under one metadata key: the format keeps no order among several. It holds a CRC-32 of every tensor and one of
itself, so that damage is found by whoever reads a part of the file.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsetwin.checkpoint._atomic import HashedWriter, Written, remove_stale, write_temporary
from sparsetwin.checkpoint._plain import JSON, dump_json, parse_json
from sparsetwin.errors import CheckpointError, SparsetwinError, StateError

METADATA_KEY = "sparsetwin"
_TENSOR_SUMS, _OWN_SUM = "crc32", "crc32_of_metadata"
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


def write_file(path: Path, entries: Iterable[Entry], metadata: Mapping[str, JSON] | None) -> Written:
    """Write a safetensors file beside ``path``; equal entries and metadata give equal bytes.

    Args:
        path: The name that it is to get.
        entries: Their order does not matter.
        metadata: Plain data, stored under the one key of this library with the checksums; None writes a file in which
            nothing is this library's own.

    Raises:
        CheckpointError: As `write_temporary` does, and if the metadata is not plain data.
        StateError: If a name cannot be stored.
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))  # keeps every tensor aligned
    if metadata is not None:
        dump_json(dict(metadata), what="metadata")  # refuse it before tensors are made
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        if entry.name in header or not _is_text(entry.name):
            raise StateError(f"a tensor cannot be stored under the name {entry.name!r}: it is taken or not text")
        offsets = [offset, offset := offset + entry.bytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    if metadata is not None:
        header["__metadata__"] = {METADATA_KEY: _with_sums(metadata, {e.name: _sum_of(e.make()) for e in ordered})}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(file: HashedWriter) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            tensor = entry.make()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            file.write(_bytes_of(tensor))

    remove_stale(path.parent, target=path.name)
    return write_temporary(path, write)


class Reader:
    """An open safetensors file, its header checked against the file's size; `own` opens those of this library.

    Args:
        path: For messages.
        file: As ``safe_open`` gave it.
        metadata: Plain data of this library, if it wrote the file.
        sums: The checksum of every tensor, if it wrote any.
    """

    def __init__(
        self, path: Path, file: Any, *, metadata: dict[str, JSON] | None = None, sums: dict[str, JSON] | None = None
    ) -> None:
        self.path = path
        self.metadata: dict[str, JSON] = {} if metadata is None else metadata
        self.names = tuple(sorted(file.keys()))
        self._file = file
        self._sums = sums
        self._verified: set[str] = set()

    @classmethod
    def own(cls, path: Path, file: Any) -> Self:
        """Return the reader of a file of this library.

        Raises:
            CheckpointError: If it is none, or its header is corrupted.
        """
        text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise CheckpointError(f"{path} was not written by this library: it has no metadata {METADATA_KEY!r}")
        metadata = parse_json(text, what=f"{path}: its metadata")
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{path}: its metadata is no JSON object")
        sums = _checked_sums(path, metadata, tuple(sorted(file.keys())))
        return cls(path, file, metadata=metadata, sums=sums)

    def layout(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return the dtype and the shape of a tensor without reading it."""
        part = self._file.get_slice(name)
        code = part.get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(f"{self.path}: {name} has the dtype {code}, which this library cannot read")
        return _DTYPES[code], tuple(part.get_shape())

    def map(self, name: str) -> Tensor:
        """Return a tensor as it lies in the mapped file; what is written to it stays in this process.

        Raises:
            CheckpointError: If its checksum is not the listed one.
        """
        tensor: Tensor = self._file.get_tensor(name)
        if self._sums is not None and name not in self._verified:
            if _sum_of(tensor) != self._sums[name]:
                raise CheckpointError(f"{self.path} is corrupted: the checksum of {name} is not the one that it lists")
            self._verified.add(name)
        return tensor

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own, on the CPU.

        Raises:
            CheckpointError: As `map` does.
        """
        return self.map(name).clone()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file into an error that names the file.

    Raises:
        CheckpointError: If the file is missing, truncated, corrupted or foreign.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, SparsetwinError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)  # torch adds a trace of its own below
        raise CheckpointError(f"{path} is truncated, corrupted or no safetensors file: {reason}") from error


@contextmanager
def open_file(path: Path, *, foreign: bool = False) -> Iterator[Reader]:
    """Open a file for reading its tensors one by one.

    Args:
        path: The file.
        foreign: Take it as it is, whoever wrote it.

    Raises:
        CheckpointError: Inside the block too, as `naming` does.
    """
    with naming(path), safe_open(path, framework="pt", device="cpu") as file:
        yield Reader(path, file) if foreign else Reader.own(path, file)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _sum_of(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's dtype and shape, such as ``F32[2,3]``, and of its bytes."""
    layout = _CODES[tensor.dtype] + json.dumps(list(tensor.shape), separators=(",", ":"))
    return zlib.crc32(_bytes_of(tensor), zlib.crc32(layout.encode()))


def _with_sums(metadata: Mapping[str, JSON], sums: Mapping[str, int]) -> str:
    """Return the text of the metadata with the checksums added."""
    with_tensors = {**metadata, _TENSOR_SUMS: dict(sums)}
    own = zlib.crc32(dump_json(with_tensors, what="metadata").encode())
    return dump_json({**with_tensors, _OWN_SUM: own}, what="metadata")


def _checked_sums(path: Path, metadata: Mapping[str, JSON], names: tuple[str, ...]) -> dict[str, JSON] | None:
    """Return the checksum of every tensor, or None for a file that was written without any."""
    if _TENSOR_SUMS not in metadata and _OWN_SUM not in metadata:
        return None
    sums = metadata.get(_TENSOR_SUMS)
    covered = {key: value for key, value in metadata.items() if key != _OWN_SUM}
    own = zlib.crc32(dump_json(covered, what=f"{path}: its metadata").encode())
    if not isinstance(sums, dict) or tuple(sorted(sums)) != names or metadata.get(_OWN_SUM) != own:
        raise CheckpointError(f"{path} is corrupted: the checksum of its header is not the one that it lists")
    return sums


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name != "__metadata__"
