"""Files that were damaged at random or made by an enemy, and what reading them may do.

Run as a program it damages files for a while with little memory to take, and prints how many it refused.
"""

import json
import random
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsetwin.checkpoint import (
    SparseFile,
    iter_sparse,
    load_dense,
    load_masks,
    load_sparse,
    load_sparse_bitmask,
    read_card,
    save_dense,
    save_sparse,
    save_sparse_bitmask,
)
from sparsetwin.errors import CheckpointError

HUGE = (2**31, 2**40, 2**60, 2**63 - 1, 2**63, 2**64, 2**200, -1, 1.5, None, "8", True, [], {})
_EXTRA_BYTES = 192 * 2**20  # that a process may take beyond what it has
_CARD = {"step": 1, "data_notice": "public domain"}


def network() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A sparse, a dense, a tied, an empty and an integer tensor."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 11, generator=generator) < 0.4
    weight = torch.where(mask, torch.randn(6, 11, generator=generator), 0.0)
    bias = torch.randn(6, generator=generator)
    tensors = {"fc.weight": weight, "fc.bias": bias, "tied": bias, "empty": torch.ones(0, 2), "n": torch.tensor(3)}
    return tensors, {"fc.weight": mask}


def write_all(folder: Path) -> list[Path]:
    """Write a file of every kind."""
    tensors, masks = network()
    paths = [folder / name for name in ("exact", "int8", "bfloat16", "dense", "legacy")]
    save_sparse(paths[0], tensors, masks, card=_CARD)
    save_sparse(paths[1], tensors, masks, card=_CARD, values="int8")
    save_sparse(paths[2], tensors, masks, card=_CARD, values="bfloat16")
    save_dense(paths[3], tensors, card=_CARD)
    save_sparse_bitmask(paths[4], tensors, masks)
    return paths


def contents(path: Path) -> list[tuple[str, Any]]:
    """What every reader makes of a file, as bytes; errors of ours stand for themselves, others pass through."""
    found = []
    for read in (load_sparse, load_dense, load_masks, read_card, iter_sparse, _mapped, load_sparse_bitmask):
        try:
            result = read(path)
            plain = result if isinstance(result, dict) else vars(result) if hasattr(result, "masks") else dict(result)
            found.append((read.__name__, _as_bytes(plain)))
        except CheckpointError as error:
            message = str(error)
            assert path.name in message, message
            for word in ("allocate", "memory"):  # torch's and numpy's words for it, when they ask for too much
                assert word not in message.lower(), message
            found.append((read.__name__, None))
    return found


def _mapped(path: Path) -> dict[str, Any]:
    with SparseFile.open(path) as file:
        told = {name: (file.shape(name), str(file.dtype(name)), file.encoding(name)) for name in file.names}
        tensors = {f"{name}, dense": file.dense(name) for name in file.names}
        bits = {f"{name}, bits": file.mask_bits(name).clone() for name in file.sparse_names}
        values = {f"{name}, values": file.values(name).clone() for name in file.sparse_names}
        return {**told, **tensors, **bits, **values, "card": file.card}


def _as_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, dict):
        return {key: _as_bytes(item) for key, item in value.items()}
    return value


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a file's header and its data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    """Return a file with a header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def damaged(content: bytes, draw: random.Random) -> Iterator[bytes]:
    """Yield one file of every kind of damage."""
    yield draw.randbytes(draw.randrange(300))
    yield content[: draw.randrange(len(content))]
    yield content + draw.randbytes(draw.randrange(1, 20))
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    yield bytes(flipped)
    start = draw.randrange(len(content))
    yield content[:start] + draw.randbytes(draw.randrange(1, 9)) + content[start + draw.randrange(9) :]
    yield struct.pack("<Q", draw.choice((0, 2**20, 2**31, 2**40, 2**63, 2**64 - 1))) + content[8:]
    header, data = split(content)
    yield join(_hostile_layout(header, draw), data)
    yield join(_hostile_metadata(header, draw), data)
    yield join(_overlapping(header, draw), data)
    yield join(_twice(header, draw), data)
    depth = draw.choice((50, 127, 500, 900, 3000, 100_000))
    yield join(b'{"__metadata__":{"sparsetwin":"' + b"[" * depth + b"]" * depth + b'"}}', b"")
    yield join(b'{"a":' * depth + b"1" + b"}" * depth, data)


def _entry(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    entry: dict[str, Any] = header[draw.choice([name for name in header if name != "__metadata__"])]
    return entry


def _hostile_layout(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    changed = json.loads(json.dumps(header))
    entry = _entry(changed, draw)
    which = draw.randrange(4)
    if which == 0:
        entry["shape"] = [draw.choice(HUGE[:7]) for _ in range(draw.randrange(1, 4))]
    elif which == 1:
        entry["shape"] = [*entry["shape"], draw.choice([*HUGE, 0, 1])]
    elif which == 2:
        entry["data_offsets"][draw.randrange(2)] = draw.choice(HUGE)
    else:
        entry["dtype"] = draw.choice(["F64", "F16", "I64", "BOOL", "F4", "U8", "C64", "", None])
    return changed


def _hostile_metadata(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    changed = json.loads(json.dumps(header))
    if "sparsetwin" not in changed["__metadata__"]:
        changed["__metadata__"] = {"format": draw.choice(["tf", "", "pt"])}
        return changed
    metadata = json.loads(changed["__metadata__"]["sparsetwin"])
    if draw.random() < 0.7:  # an enemy leaves them out
        metadata.pop("crc32")
        metadata.pop("crc32_of_metadata")
    parents: list[tuple[Any, Any]] = [(metadata, key) for key in metadata]
    for value in list(metadata.values()):
        if isinstance(value, dict):
            parents += [(value, key) for key in value]
            parents += [(item, key) for item in value.values() if isinstance(item, dict) for key in item]
    parent, key = draw.choice(parents)
    if draw.random() < 0.2:
        del parent[key]
    elif key == "shape" and draw.random() < 0.7:
        parent[key] = [draw.choice((0, 1, 6, 11, *HUGE)) for _ in range(draw.randrange(4))]
    elif key == "encoding":
        parent[key] = draw.choice(["bitmask", "bitmask-int8", "bitmask-float16", "bitmask-bfloat16", "csr", None])
    else:
        parent[key] = draw.choice(HUGE)
    changed["__metadata__"]["sparsetwin"] = json.dumps(metadata)
    return changed


def _overlapping(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    changed = json.loads(json.dumps(header))
    one, other = _entry(changed, draw), _entry(changed, draw)
    one["data_offsets"] = list(other["data_offsets"])
    return changed


def _twice(header: dict[str, Any], draw: random.Random) -> bytes:
    text = json.dumps(header).encode()
    name = draw.choice(list(header))
    again = json.dumps({name: header[draw.choice(list(header))]}).encode()
    return text[:-1] + b"," + again[1:]


def main(folder: Path, seed: int, rounds: int) -> None:
    """Damage files and read them."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    originals = {path: path.read_bytes() for path in write_all(folder)}
    whole = {path: contents(path) for path in originals}  # which loads what is loaded on first use
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _EXTRA_BYTES,) * 2)
    refused = read = 0
    for _ in range(rounds):
        for path, original in originals.items():
            for content in damaged(original, draw):
                path.write_bytes(content)
                found = contents(path)
                has_sums = path.name != "legacy" and b"crc32_of_metadata" in content
                for reader, (name, result) in enumerate(found):
                    refused += result is None
                    read += result is not None
                    if result is not None and has_sums and name not in ("load_sparse_bitmask", "load_dense"):
                        assert result == whole[path][reader][1], (path.name, name)
    print(json.dumps({"refused": refused, "read": read}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
