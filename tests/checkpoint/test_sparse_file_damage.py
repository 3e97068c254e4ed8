"""Damaged, hostile and foreign files: an error of ours that names the file, and never memory beyond the file's size."""

import json
import random
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from sparsetwin.checkpoint import iter_sparse, load_dense, load_masks, load_sparse, read_card, save_sparse
from sparsetwin.errors import CheckpointError

_READERS = [load_sparse, load_dense, load_masks, read_card, lambda path: list(iter_sparse(path))]


@pytest.fixture
def path(tmp_path):
    """A small file with a sparse, a dense, a tied and an empty tensor."""
    mask = torch.tensor([[True, False, True], [False, False, True]])
    weight = torch.where(mask, torch.arange(6.0).reshape(2, 3), 0.0)
    other = torch.arange(3)
    tensors = {"w": weight, "n": other, "tied": other, "empty": torch.ones(0, 2)}
    path = tmp_path / "network.safetensors"
    save_sparse(path, tensors, {"w": mask}, card={"step": 1})
    return path


def load_or_refuse(path):
    """Load a file; return whether that worked, and let through no error but ours, which names the file."""
    try:
        load_sparse(path)
    except CheckpointError as error:
        message = str(error)
    else:
        return True
    assert path.name in message
    return False


def with_header(change, content):
    """Return a file's bytes with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def with_metadata(change, content):
    """Return a file's bytes with other metadata of ours, and no checksums."""

    def change_header(header):
        metadata = json.loads(header["__metadata__"]["sparsetwin"])
        del metadata["crc32"], metadata["crc32_of_metadata"]
        change(metadata)
        header["__metadata__"]["sparsetwin"] = json.dumps(metadata)

    return with_header(change_header, content)


def test_every_truncation_is_found(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not load_or_refuse(path), length
    path.write_bytes(content + b"\0")
    assert not load_or_refuse(path)


def test_no_flipped_bit_gives_another_error_than_ours(path):
    content = bytearray(path.read_bytes())
    found = 0
    for position in range(len(content)):
        for bit in {0, 4, position % 8}:
            content[position] ^= 1 << bit
            path.write_bytes(content)
            found += not load_or_refuse(path)
            content[position] ^= 1 << bit
    assert found > len(content)  # the rest are bits of values, names and the card: a sha256 finds them


def test_random_bytes_are_no_network(path):
    generator = random.Random(0)
    content = path.read_bytes()
    for _ in range(300):
        path.write_bytes(generator.randbytes(generator.randrange(200)))
        assert not load_or_refuse(path)
        text = generator.randbytes(generator.randrange(60))
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        assert not load_or_refuse(path)
        start = generator.randrange(len(content))
        path.write_bytes(content[:start] + generator.randbytes(8) + content[start + 8 :])
        load_or_refuse(path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, 99_999_999])
def test_a_hostile_header_length_takes_no_memory(path, length):
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    tracemalloc.start()
    assert not load_or_refuse(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "part",
    [
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [2**62, 2**62 + 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
    ],
)
def test_hostile_shapes_in_the_header_are_refused(path, part):
    header = {"__metadata__": {"sparsetwin": '{"version":1,"sparse":{},"shared":{},"card":{}}'}, "w": part}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(part["data_offsets"][1] % 64))
    assert not load_or_refuse(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "has format version 2, this library reads version 1"),
        (lambda m: m.update(version=True), "has format version True"),
        (lambda m: m.pop("version"), "has format version None"),
        (lambda m: m.pop("sparse"), "'sparse' should be a JSON object, got None"),
        (lambda m: m.update(shared=[]), r"'shared' should be a JSON object, got \[\]"),
        (lambda m: m.update(card=None), "'card' should be a JSON object, got None"),
        (lambda m: m["sparse"]["w"].pop("shape"), "should have encoding, dtype and shape"),
        (lambda m: m["sparse"].update(w={"encoding": "new", "more": 1}), "is encoded as 'new', this library reads"),
        (lambda m: m["sparse"].update(w=3), "should have encoding, dtype and shape, got 3"),
        (
            lambda m: m["sparse"]["w"].update(encoding="bitmask-int4"),
            "is encoded as 'bitmask-int4', this library reads",
        ),
        (lambda m: m["sparse"]["w"].update(dtype="int8"), "has dtype 'int8'; known: float64"),
        (lambda m: m["sparse"]["w"].update(dtype="float16"), "of shape .* and torch.float16 has bits"),
        (lambda m: m["sparse"]["w"].update(shape=6), "has the shape 6, expected a list"),
        (lambda m: m["sparse"]["w"].update(shape=[2, -3]), "expected whole numbers"),
        (lambda m: m["sparse"]["w"].update(shape=[2.0, 3]), "expected whole numbers"),
        (lambda m: m["sparse"]["w"].update(shape=[2**70, 0]), "expected whole numbers"),
        (lambda m: m["sparse"]["w"].update(shape=[2**40, 2**40]), "has bits"),
        (lambda m: m["sparse"]["w"].update(shape=[9]), "has bits"),
        (lambda m: m["sparse"]["w"].update(shape=[5]), "bits beyond its 5 elements"),
        (lambda m: m["sparse"].update(n=m["sparse"]["w"]), "the sparse tensor n lacks n.bitmask and n.values"),
        (lambda m: m["shared"].update(tied="absent"), "tied should share the tensor of 'absent', which cannot be"),
        (lambda m: m["shared"].update(tied=[1]), r"tied should share the tensor of \[1\], which cannot be"),
        (lambda m: m["shared"].update(w="n"), "w should share the tensor of 'n', which cannot be"),
        (lambda m: m["shared"].update(tied="tied"), "tied should share the tensor of 'tied', which cannot be"),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(path, change, message):
    path.write_bytes(with_metadata(change, path.read_bytes()))
    for read in _READERS:
        if "bits beyond" in message and read in (read_card, load_dense):
            continue  # seen in the tensors only
        with pytest.raises(CheckpointError, match=rf"network.safetensors.*{message}"):
            read(path)


def test_a_tensor_that_is_both_dense_and_sparse_is_refused(path):
    tensors = {"w": torch.zeros(2), "w.bitmask": torch.zeros(1, dtype=torch.uint8), "w.values": torch.zeros(0)}
    sparse = {"w": {"encoding": "bitmask", "dtype": "float32", "shape": [2]}}
    text = json.dumps({"version": 1, "sparse": sparse, "shared": {}, "card": {}})
    save_file(tensors, path, {"sparsetwin": text})
    with pytest.raises(CheckpointError, match="w is stored both dense and sparse"):
        load_sparse(path)


def test_values_that_do_not_match_the_bits_are_refused(path):
    tensors = {"w.bitmask": torch.tensor([3], dtype=torch.uint8), "w.values": torch.zeros(1)}
    sparse = {"w": {"encoding": "bitmask", "dtype": "float32", "shape": [2]}}
    text = json.dumps({"version": 1, "sparse": sparse, "shared": {}, "card": {}})
    save_file(tensors, path, {"sparsetwin": text})
    with pytest.raises(CheckpointError, match="w has 1 values, but its bits keep 2"):
        load_sparse(path)


@pytest.mark.parametrize("text", ["", "3", "null", "[" * 50_000, '{"version": NaN}', '{"version": ' + "9" * 5000 + "}"])
def test_metadata_that_is_no_json_object_is_refused(path, text):
    save_file({"w": torch.zeros(1)}, path, {"sparsetwin": text})
    assert not load_or_refuse(path)


def test_foreign_and_missing_files_are_named(path, tmp_path):
    save_file({"w": torch.zeros(1)}, path)
    for read in _READERS:
        with pytest.raises(CheckpointError, match=r"network.safetensors was not written by this library"):
            read(path)
        with pytest.raises(CheckpointError, match=r"absent does not exist"):
            read(tmp_path / "absent")
        with pytest.raises(CheckpointError, match=r"cannot read|truncated"):
            read(tmp_path)
    torch.save({}, path)
    assert not load_or_refuse(path)
