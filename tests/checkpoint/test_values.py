"""Kept values in fewer bits: what rounding does to them, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparsetwin.checkpoint import VALUES, SparseFile, iter_sparse, load_sparse, save_sparse, sparse_size
from sparsetwin.errors import StateError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS = {"float32": 24, "bfloat16": 8, "float16": 11}  # of the significand


def pruned(shape, *, dtype=torch.float32, seed=0, density=0.3, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return torch.where(mask, weight, torch.zeros((), dtype=dtype)), mask


def stored(folder, weight, mask, values, **load):
    save_sparse(folder / "f", {"w": weight}, {"w": mask}, values=values)
    found = load_sparse(folder / "f", **load)
    assert torch.equal(found.masks["w"], mask)
    return found.tensors["w"]


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (0,), (9,), (7, 13), (3, 0, 2), (4, 2, 3, 3)])
def test_16_bit_values_are_the_nearest_and_pruned_ones_stay_zero(tmp_path, values, shape):
    weight, mask = pruned(shape)
    found = stored(tmp_path, weight, mask, values)
    assert found.dtype == weight.dtype
    assert torch.equal(found, weight.to(getattr(torch, values)).float())
    assert not found[~mask].any()
    assert bool((found[mask] - weight[mask]).abs().le(weight[mask].abs() * 2.0 ** -BITS[values] + 2.0**-25).all())


def test_values_halfway_between_two_are_rounded_to_the_even_one(tmp_path):
    step = 2.0**-7  # between bfloat16 numbers from 1 on
    weight = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2**-20])
    assert stored(tmp_path, weight, weight != 0, "bfloat16").tolist() == [1.0, 1 + 2 * step, 1 + step]
    tens = torch.tensor([[127.0, 0.5, 1.5, -2.5, 3.4]])
    assert stored(tmp_path, tens, tens != 0, "int8").tolist() == [[127.0, 0.0, 2.0, -2.0, 3.0]]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    shape=st.lists(st.integers(0, 6), max_size=4),
    dtype=st.sampled_from(FLOATS),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_int8_values_are_within_half_a_step_of_their_channel(tmp_path_factory, seed, shape, dtype, density, scale):
    weight, mask = pruned(shape, dtype=dtype, seed=seed, density=density, scale=scale)
    folder = tmp_path_factory.mktemp("int8")
    found = stored(folder, weight, mask, "int8")
    assert found.dtype == dtype
    assert not found[~mask].any()
    rows = shape[0] if shape else 1
    scales = load_file(folder / "f")["w.scales"]
    assert (scales.dtype, scales.shape) == (torch.float32, (rows,))
    if weight.numel():
        error = (found.double() - weight.double()).reshape(rows, -1).abs().amax(1)
        own = torch.finfo(dtype).eps * weight.double().reshape(rows, -1).abs().amax(1)  # back in the weight's dtype
        assert bool((error <= scales.double() * 0.5 * (1 + 1e-5) + own).all())
        largest = weight.double().reshape(rows, -1).abs().amax(1)
        assert torch.allclose(scales.double() * 127, largest, rtol=1e-6, atol=0)


def test_every_channel_has_its_own_scale_and_a_small_one_keeps_its_precision(tmp_path):
    weight = torch.tensor([[100.0, 50.0, 0.0], [0.001, 0.0, -0.0005], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [False, True, False]])  # a channel of one kept zero
    found = stored(tmp_path, weight, mask, "int8")
    assert torch.allclose(found, weight, rtol=0.01, atol=0)
    assert load_file(tmp_path / "f")["w.values"].tolist() == [127, 64, 127, -64, 0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", VALUES)
def test_values_are_never_widened_and_those_of_the_same_dtype_are_exact(tmp_path, same_bits, dtype, values):
    weight, mask = pruned((6, 20), dtype=dtype)
    found = stored(tmp_path, weight, mask, values)
    kept = load_file(tmp_path / "f")["w.values"]
    if values == "exact" or (values != "int8" and getattr(torch, values).itemsize > dtype.itemsize):
        assert kept.dtype == dtype
        same_bits({"w": found}, {"w": weight})
    else:
        assert kept.dtype == getattr(torch, values)
    if values == str(dtype).removeprefix("torch."):
        save_sparse(tmp_path / "exact", {"w": weight}, {"w": mask})
        assert (tmp_path / "exact").read_bytes() == (tmp_path / "f").read_bytes()


def test_tensors_without_a_mask_are_exact(tmp_path, same_bits):
    weight, mask = pruned((4, 5))
    bias, running = torch.randn(4), torch.randn(4, dtype=torch.float64)
    tensors = {"w": weight, "bias": bias, "running": running, "count": torch.tensor(7)}
    save_sparse(tmp_path / "f", tensors, {"w": mask}, values="int8")
    found = load_sparse(tmp_path / "f").tensors
    same_bits({name: found[name] for name in tensors if name != "w"}, {n: t for n, t in tensors.items() if n != "w"})


@pytest.mark.parametrize("values", VALUES)
def test_a_file_reads_back_in_the_dtype_that_is_wished_for(tmp_path, values):
    weight, mask = pruned((5, 7))
    tensors = {"w": weight, "tied": weight, "bias": torch.randn(5), "count": torch.tensor(7)}
    save_sparse(tmp_path / "f", tensors, {"w": mask}, values=values)
    plain = load_sparse(tmp_path / "f").tensors
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in plain.items()}
        found = load_sparse(tmp_path / "f", dtype=dtype).tensors
        one_by_one = dict(iter_sparse(tmp_path / "f", dtype=dtype))
        with SparseFile.open(tmp_path / "f") as file:
            mapped = {name: file.dense(name, dtype=dtype) for name in file.names}
        for name, tensor in expected.items():
            for other in (found, one_by_one, mapped):
                assert other[name].dtype == tensor.dtype
                assert torch.equal(other[name], tensor)


def test_equal_networks_give_equal_bytes_in_every_form(tmp_path):
    for values in VALUES:
        weight, mask = pruned((8, 3, 3, 3))
        paths = tmp_path / f"{values}-a", tmp_path / f"{values}-b"
        for path, tensor in zip(paths, (weight, weight.to(memory_format=torch.channels_last)), strict=True):
            save_sparse(path, {"w": tensor}, {"w": mask}, values=values)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_at_90_percent_each_form_has_the_size_that_is_computed(tmp_path):
    weight, mask = pruned((200, 500), density=1.0)
    mask = torch.zeros(100_000, dtype=torch.bool)
    mask[torch.randperm(100_000, generator=torch.Generator().manual_seed(0))[:10_000]] = True
    mask = mask.view(200, 500)
    tensors = {"w": torch.where(mask, weight, 0.0)}
    expected = {"exact": 52_500, "float32": 52_500, "bfloat16": 32_500, "float16": 32_500, "int8": 22_500 + 800}
    for values, target_bytes in expected.items():
        size = sparse_size(tensors, {"w": mask}, values=values)
        assert size.target_bytes == target_bytes
        save_sparse(tmp_path / values, tensors, {"w": mask}, values=values)
        assert 0 < (tmp_path / values).stat().st_size - target_bytes < 700  # the header
    assert sparse_size(tensors, {"w": mask}, values="int8").fraction == 0.05825


@pytest.mark.parametrize(
    ("value", "dtype", "values", "message"),
    [
        (1e5, torch.float32, "float16", "w has values up to 100000, too large for float16; store them as bfloat16"),
        (65520.0, torch.float32, "float16", "too large for float16"),
        (3.4e38, torch.float32, "bfloat16", "too large for bfloat16; store them as exact"),
        (1e39, torch.float64, "float32", "too large for float32"),
        (1e300, torch.float64, "int8", "too large for int8"),
        (float("nan"), torch.float32, "int8", "w has values that are not finite, which int8 cannot hold"),
        (float("inf"), torch.float32, "int8", "w has values that are not finite, which int8 cannot hold"),
    ],
)
def test_a_value_that_the_form_cannot_hold_is_refused_by_name_and_nothing_written(
    tmp_path, value, dtype, values, message
):
    weight = torch.tensor([[0.5, value]], dtype=dtype)
    with pytest.raises(StateError, match=message):
        save_sparse(tmp_path / "f", {"w": weight}, {"w": weight != 0}, values=values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_the_largest_numbers_of_a_dtype_survive_int8(tmp_path, dtype):
    weight = torch.tensor([[torch.finfo(dtype).max, 1.0], [-torch.finfo(dtype).max, 0.0]], dtype=dtype)
    mask = weight != 0
    try:
        found = stored(tmp_path, weight, mask, "int8")
    except StateError as error:
        assert "too large for int8" in str(error)  # noqa: PT017  refusing is right too, infinity is not
    else:
        assert bool(found.isfinite().all())


def test_infinity_and_nan_pass_through_floats(tmp_path):
    weight = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])
    for values in ("bfloat16", "float16"):
        found = stored(tmp_path, weight, torch.ones(4, dtype=torch.bool), values)
        np.testing.assert_array_equal(found.numpy(), weight.numpy())


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(StateError, match="values can be stored as exact, float32, bfloat16, float16, int8; got 'int4'"):
        save_sparse(tmp_path / "f", {"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.bool)}, values="int4")
