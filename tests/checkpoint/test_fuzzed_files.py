"""Loaders face random, truncated, flipped and hostile files: a correct result or an error of ours, in little memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetwin.checkpoint import load_sparse
from sparsetwin.errors import CheckpointError

_PLAIN = st.none() | st.booleans() | st.sampled_from(fuzzing.HUGE) | st.floats() | st.text(max_size=5)
_ANY_JSON = st.recursive(
    _PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A file of every kind: path -> bytes and what each reader makes of it."""
    paths = fuzzing.write_all(tmp_path_factory.mktemp("fuzz"))
    return {path: (path.read_bytes(), fuzzing.contents(path)) for path in paths}


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("seed", [0, 1])
def test_thousands_of_damaged_files_are_read_right_or_refused_in_little_memory(tmp_path, seed):
    done = subprocess.run(
        [sys.executable, fuzzing.__file__, str(tmp_path), str(seed), "30"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["refused"] > 10_000
    assert counts["read"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_ten_times_as_many_are_too(tmp_path, seed):
    done = subprocess.run(
        [sys.executable, fuzzing.__file__, str(tmp_path), str(seed), "300"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["exact", "int8", "bfloat16", "dense"])
def test_no_single_flipped_bit_is_read_as_something_else(originals, kind, tmp_path):
    content, whole = next(value for path, value in originals.items() if path.name == kind)
    expected = dict(whole)["load_sparse"]
    path = tmp_path / kind
    draw = random.Random(kind)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = load_sparse(path)
        except CheckpointError as error:
            assert kind in str(error)  # noqa: PT017
        else:
            assert fuzzing._as_bytes(vars(found)) == expected, position


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(["exact", "int8", "dense"]),
    key=st.sampled_from(["version", "sparse", "shared", "card"]),
    value=_ANY_JSON,
)
def test_any_json_in_any_place_of_the_metadata_is_refused_or_read(originals, tmp_path_factory, kind, key, value):
    content, whole = next(value for path, value in originals.items() if path.name == kind)
    header, data = fuzzing.split(content)
    metadata = json.loads(header["__metadata__"]["sparsetwin"])
    metadata[key] = value
    damaged = tmp_path_factory.getbasetemp() / f"{kind}-metadata"
    header["__metadata__"]["sparsetwin"] = json.dumps(metadata)
    damaged.write_bytes(fuzzing.join(header, data))
    with_sums = fuzzing.contents(damaged)
    assert all(result in (None, expected) for (_, result), (_, expected) in zip(with_sums, whole, strict=True))
    metadata.pop("crc32")
    metadata.pop("crc32_of_metadata")
    header["__metadata__"]["sparsetwin"] = json.dumps(metadata)
    damaged.write_bytes(fuzzing.join(header, data))
    fuzzing.contents(damaged)  # no other error than ours


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_by_every_reader(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "noise"
    for text in (content, fuzzing.join(content, b""), fuzzing.join(content, content)):
        path.write_bytes(text)
        assert all(result is None for _, result in fuzzing.contents(path))


@pytest.mark.parametrize("key", ["crc32", "crc32_of_metadata"])
def test_a_file_that_lost_one_of_its_checksums_is_refused(originals, tmp_path, key):
    content = next(value for path, value in originals.items() if path.name == "exact")[0]
    header, data = fuzzing.split(content)
    metadata = json.loads(header["__metadata__"]["sparsetwin"])
    del metadata[key]
    header["__metadata__"]["sparsetwin"] = json.dumps(metadata)
    (tmp_path / "f").write_bytes(fuzzing.join(header, data))
    with pytest.raises(CheckpointError, match="f is corrupted: the checksum of its header"):
        load_sparse(tmp_path / "f")


def test_files_without_any_checksum_are_read(originals, tmp_path):
    content, whole = next(value for path, value in originals.items() if path.name == "exact")
    header, data = fuzzing.split(content)
    metadata = json.loads(header["__metadata__"]["sparsetwin"])
    del metadata["crc32"], metadata["crc32_of_metadata"]
    header["__metadata__"]["sparsetwin"] = json.dumps(metadata)
    (tmp_path / "exact").write_bytes(fuzzing.join(header, data))
    assert fuzzing.contents(tmp_path / "exact") == whole


def test_a_key_that_is_named_twice_is_refused(originals, tmp_path):
    content = next(value for path, value in originals.items() if path.name == "exact")[0]
    header, data = fuzzing.split(content)
    text = header["__metadata__"]["sparsetwin"]
    header["__metadata__"]["sparsetwin"] = text[:-1] + ',"version":1}'
    (tmp_path / "f").write_bytes(fuzzing.join(header, data))
    with pytest.raises(CheckpointError, match="its metadata is not valid JSON: an object names a key twice"):
        load_sparse(tmp_path / "f")


def test_the_readers_are_all_exercised(originals):
    read = {name for _, whole in originals.values() for name, result in whole if result is not None}
    assert len(read) == 7
    assert Path(fuzzing.__file__).parent == Path(__file__).parent
