"""The legacy layout: read and written to the byte, both ways, and nothing else let through."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsetwin.checkpoint import (
    from_sparse_bitmask,
    load_sparse,
    load_sparse_bitmask,
    save_sparse,
    save_sparse_bitmask,
    to_sparse_bitmask,
)
from sparsetwin.errors import CheckpointError, StateError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def legacy_parts(prefix, weight):
    """What the retired library wrote of a weight, put together element by element."""
    *rows, columns = weight.shape
    flat = weight.reshape(-1, columns)
    bits = np.zeros((len(flat), -(-columns // 8)), dtype=np.uint8)
    values, counts = [], []
    for row, line in enumerate(flat):
        kept = [column for column in range(columns) if line[column] != 0]
        counts.append(len(kept))
        values += [line[column] for column in kept]
        for column in kept:
            bits[row, column // 8] |= 1 << column % 8
    before = torch.tensor(counts, dtype=torch.int64).reshape(rows)
    offsets = torch.zeros(rows, dtype=torch.int64)
    for index in range(1, rows[0] if rows else 0):
        offsets[index] = offsets[index - 1] + before[index - 1]  # along the first axis only
    return {
        f"{prefix}.shape": torch.tensor(weight.shape),
        f"{prefix}.compressed": torch.stack(values) if values else torch.zeros(0, dtype=weight.dtype),
        f"{prefix}.bitmask": torch.from_numpy(bits).reshape(*rows, -1),
        f"{prefix}.row_offsets": offsets,
    }


def network(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc.weight": (5, 11), "conv.weight": (3, 2, 3, 3), "norm.weight": (9,), "head.sub.weight": (4, 8)}
    zero = torch.zeros(())
    weights = {
        name: torch.where(
            torch.rand(shape, generator=generator) < 0.4, torch.randn(shape, generator=generator), zero
        ).to(dtype)
        for name, shape in shapes.items()
    }
    return {**weights, "fc.bias": torch.randn(5, generator=generator), "steps": torch.tensor(3)}


def masks_of(tensors):
    return {name: tensor != 0 for name, tensor in tensors.items() if name.endswith(".weight")}


def legacy_file(tensors, path):
    parts = {name: tensor for name, tensor in tensors.items() if not name.endswith(".weight")}
    for name in masks_of(tensors):
        parts.update(legacy_parts(name.removesuffix(".weight"), tensors[name]))
    save_file(parts, path)
    return parts


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_file_of_the_retired_library_is_read_and_an_equal_one_is_written(tmp_path, same_bits, dtype):
    tensors = network(dtype)
    parts = legacy_file(tensors, tmp_path / "theirs")
    found = load_sparse_bitmask(tmp_path / "theirs")
    same_bits(found.tensors, tensors)
    same_bits(found.masks, masks_of(tensors))
    assert found.card == {}
    save_sparse_bitmask(tmp_path / "ours", tensors, masks_of(tensors))
    same_bits(load_file(tmp_path / "ours"), parts)


def test_the_layout_of_one_weight_is_the_documented_one(tmp_path):
    weight = torch.tensor([[0.0, 1.5, 0, 0, 0, 0, 0, 0, 2.5], [0, 0, 0, 0, 0, 0, 0, -1.0, 0]])
    save_sparse_bitmask(tmp_path / "f", {"a.b.weight": weight}, {"a.b.weight": weight != 0})
    parts = load_file(tmp_path / "f")
    assert parts["a.b.shape"].tolist() == [2, 9]
    assert parts["a.b.compressed"].tolist() == [1.5, 2.5, -1.0]
    assert parts["a.b.bitmask"].tolist() == [[2, 1], [128, 0]]
    assert parts["a.b.row_offsets"].tolist() == [0, 2]
    assert len(parts) == 4
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_names_of_the_first_releases_are_read(tmp_path, same_bits):
    weight = network()["fc.weight"]
    save_file(legacy_parts("fc.weight", weight), tmp_path / "f")
    same_bits(load_sparse_bitmask(tmp_path / "f").tensors, {"fc.weight": weight})


def test_offsets_that_run_over_all_rows_are_read_too(tmp_path, same_bits):
    weight = network()["conv.weight"]
    parts = legacy_parts("conv", weight)
    counts = (weight != 0).sum(-1).reshape(-1)
    parts["conv.row_offsets"] = counts.cumsum(0) - counts
    parts["conv.bitmask"] = parts["conv.bitmask"].reshape(-1, 1)
    save_file(parts, tmp_path / "f")
    same_bits(load_sparse_bitmask(tmp_path / "f").tensors, {"conv.weight": weight})


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    density=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_every_shape_and_density_goes_both_ways_with_kept_zeros(
    tmp_path_factory, same_bits, seed, shape, dtype, density
):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = torch.where(mask, torch.randint(-1, 2, shape, generator=generator).to(dtype), torch.zeros((), dtype=dtype))
    folder = tmp_path_factory.mktemp("legacy")
    save_sparse(folder / "own", {"w.weight": weight, "b": weight.clone()}, {"w.weight": mask})
    to_sparse_bitmask(folder / "own", folder / "legacy")
    from_sparse_bitmask(folder / "legacy", folder / "again")
    assert (folder / "again").read_bytes() == (folder / "own").read_bytes()
    found = load_sparse_bitmask(folder / "legacy")
    same_bits(found.masks, {"w.weight": mask})


def test_values_of_fewer_bits_become_weights_again(tmp_path, same_bits):
    tensors = network()
    save_sparse(tmp_path / "own", tensors, masks_of(tensors), values="int8", card={"step": 1})
    to_sparse_bitmask(tmp_path / "own", tmp_path / "legacy")
    same_bits(load_sparse_bitmask(tmp_path / "legacy").tensors, load_sparse(tmp_path / "own").tensors)


def test_weights_of_other_names_and_tied_ones_are_stored_dense_under_each_name(tmp_path, same_bits):
    weight = network()["fc.weight"]
    tensors = {"in_proj_weight": weight, "a.weight": weight, "b.weight": weight, "scalar.weight": torch.tensor(2.0)}
    masks = {name: tensor != 0 for name, tensor in tensors.items() if name != "b.weight"}
    save_sparse_bitmask(tmp_path / "f", tensors, masks)
    assert {"in_proj_weight", "b.weight", "scalar.weight", "a.compressed"} <= load_file(tmp_path / "f").keys()
    found = load_sparse_bitmask(tmp_path / "f")
    same_bits(found.tensors, tensors)
    assert list(found.masks) == ["a.weight"]


def test_what_would_be_lost_is_refused(tmp_path):
    ones = torch.ones(2, 2)
    with pytest.raises(StateError, match=r"pruned elements that are not zero would be lost: a.weight \(2\)"):
        save_sparse_bitmask(tmp_path / "f", {"a.weight": ones}, {"a.weight": torch.eye(2) > 0})
    with pytest.raises(StateError, match=r"under the name 'a.shape': it is taken"):
        save_sparse_bitmask(tmp_path / "f", {"a.weight": ones, "a.shape": ones}, {"a.weight": ones > 0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("fc.row_offsets"), "the weight fc lacks row_offsets"),
        (lambda p: p.pop("fc.shape"), "the weight fc lacks shape"),
        (lambda p: p.pop("fc.bitmask"), "the weight fc lacks bitmask"),
        (lambda p: p.update({"fc.shape": torch.tensor([5, 17])}), "has bits"),
        (lambda p: p.update({"fc.shape": torch.tensor([5, -11])}), "expected whole numbers"),
        (lambda p: p.update({"fc.shape": torch.tensor([2**62, 2**62])}), "has bits"),
        (lambda p: p.update({"fc.shape": torch.tensor([2**60, 0])}), "has bits"),
        (lambda p: p.update({"fc.shape": torch.tensor([], dtype=torch.int64)}), "expected 1 to 64"),
        (lambda p: p.update({"fc.shape": torch.ones(65, dtype=torch.int64)}), "expected 1 to 64"),
        (lambda p: p.update({"fc.shape": torch.tensor([5.0, 11.0])}), "expected 1 to 64 of torch.int64"),
        (lambda p: p["fc.bitmask"].__setitem__((0, 1), 0xF8), "has bits beyond its 11 columns"),
        (lambda p: p["fc.bitmask"].bitwise_not_().bitwise_and_(1), "has .* values, but its bits keep"),
        (lambda p: p["fc.row_offsets"].add_(1), "has row_offsets that are not those of its bits"),
        (lambda p: p.update({"fc.compressed": p["fc.compressed"][:-1].clone()}), "values, but its bits keep"),
        (lambda p: p.update({"fc.compressed": p["fc.compressed"].to(torch.int32)}), "has bits"),
        (lambda p: p.update({"fc.bitmask": p["fc.bitmask"].to(torch.int8)}), "has bits"),
        (lambda p: p.update({"fc.weight": torch.zeros(1)}), "holds fc.weight twice"),
        (lambda p: p.clear(), "holds no weight in the sparse-bitmask layout"),
    ],
)
def test_a_damaged_weight_is_refused_by_name(tmp_path, change, message):
    parts = legacy_parts("fc", network()["fc.weight"])
    change(parts)
    save_file(parts, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=rf"f.safetensors.*({message})"):
        load_sparse_bitmask(tmp_path / "f.safetensors")


def test_files_of_our_own_layout_are_told_apart(tmp_path):
    tensors = network()
    save_sparse(tmp_path / "own", tensors, masks_of(tensors))
    with pytest.raises(CheckpointError, match=r"own: the weight .* lacks shape, compressed, row_offsets"):
        load_sparse_bitmask(tmp_path / "own")
    save_sparse_bitmask(tmp_path / "legacy", tensors, masks_of(tensors))
    with pytest.raises(CheckpointError, match="was not written by this library"):
        load_sparse(tmp_path / "legacy")
    (tmp_path / "short").write_bytes(struct.pack("<Q", 100) + b"{")
    with pytest.raises(CheckpointError, match="short is truncated"):
        load_sparse_bitmask(tmp_path / "short")
