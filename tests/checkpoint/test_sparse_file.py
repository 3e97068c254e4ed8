import json
import struct
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sparsetwin.checkpoint import (
    iter_sparse,
    load_dense,
    load_masks,
    load_sparse,
    read_card,
    save_dense,
    save_sparse,
    sparse_size,
)
from sparsetwin.checkpoint._atomic import sha256_of
from sparsetwin.errors import CheckpointError, StateError
from sparsetwin.masking import unpack_mask

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]


def random_bits(shape, dtype, generator):
    """Any values a dtype has, with NaN, infinities and -0.0 among them."""
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.reshape(-1).view(dtype).reshape(shape)


def where(mask, tensor):
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))


@st.composite
def networks(draw):
    """Tensors of any dtype, shape, memory format and density."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors, masks = {}, {}
    for index in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(["a.weight", "b", "weight.é", "x/y z", ""])) + str(index)
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        masked = draw(st.booleans())
        tensor = random_bits(shape, draw(st.sampled_from(FLOATS if masked else FLOATS + OTHERS)), generator)
        if masked:
            density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(0, 1))
            masks[name] = torch.rand(shape, generator=generator) < density
            tensor = where(masks[name], tensor)
        if len(shape) == 4 and draw(st.booleans()):
            tensor = tensor.to(memory_format=torch.channels_last)
        elif draw(st.booleans()) and len(shape) > 1:
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        tensors[name] = tensor
    return tensors, masks


@settings(deadline=None, max_examples=60)
@given(networks(), st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=2))
def test_every_bit_survives_and_equal_networks_give_equal_bytes(same_bits, network, card):
    tensors, masks = network
    with TemporaryDirectory() as folder:
        path, again = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        digest = save_sparse(path, tensors, masks, card=card)
        found = load_sparse(path)
        same_bits(found.tensors, tensors)
        same_bits(found.masks, masks)
        same_bits(load_masks(path), masks)
        same_bits(dict(iter_sparse(path)), tensors)
        assert found.card == read_card(path) == card
        save_sparse(again, dict(reversed(found.tensors.items())), dict(reversed(found.masks.items())), card=card)
        assert again.read_bytes() == path.read_bytes()
        assert sha256_of(path) == digest


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7,), (8,), (9,), (2, 3, 4, 5)])
@pytest.mark.parametrize("density", [0, 0.5, 1])
def test_every_dtype_shape_and_density_survives(tmp_path, same_bits, dtype, shape, density):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < density
    tensor = where(mask, random_bits(shape, dtype, generator))
    save_sparse(tmp_path / "f", {"w": tensor, "dense": tensor}, {"w": mask})
    found = load_sparse(tmp_path / "f")
    same_bits(found.tensors, {"w": tensor, "dense": tensor})
    same_bits(found.masks, {"w": mask})


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_a_nan_keeps_its_payload(tmp_path, same_bits, shape):
    signalling = torch.full(shape, 31817, dtype=torch.int16).view(torch.float16)
    save_sparse(tmp_path / "f", {"w": signalling}, {"w": torch.ones(shape, dtype=torch.bool)})
    same_bits(load_sparse(tmp_path / "f").tensors, {"w": signalling})


def test_the_layout_is_the_documented_one(tmp_path):
    weight = torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, -2.0]])
    mask = torch.tensor([[False, True, False], [True, False, True]])  # one kept weight is zero
    save_sparse(tmp_path / "f", {"w": weight, "n": torch.tensor(3)}, {"w": mask}, card={"step": 7})
    parts = load_file(tmp_path / "f")
    assert parts.keys() == {"w.bitmask", "w.values", "n"}
    assert parts["w.values"].tolist() == [1.5, 0.0, -2.0]
    assert parts["w.bitmask"].tolist() == [0b101010]
    assert torch.equal(unpack_mask(parts["w.bitmask"], shape=(2, 3)), mask)
    sums = {
        "n": zlib.crc32(b"I64[]" + struct.pack("<q", 3)),
        "w.bitmask": zlib.crc32(b"U8[1]" + bytes([0b101010])),
        "w.values": zlib.crc32(b"F32[3]" + struct.pack("<fff", 1.5, 0.0, -2.0)),
    }
    checked = (
        f'{{"card":{{"step":7}},"crc32":{json.dumps(sums, separators=(",", ":"))},%s"shared":{{}},'
        '"sparse":{"w":{"dtype":"float32","encoding":"bitmask","shape":[2,3]}},"version":1}'
    )
    own = zlib.crc32((checked % "").encode())
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"sparsetwin": checked % f'"crc32_of_metadata":{own},'}


def test_tensors_lie_aligned_in_the_file(tmp_path):
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(1), "c": torch.zeros(1, dtype=torch.float64)}
    save_dense(tmp_path / "f", tensors)
    content = (tmp_path / "f").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_at_90_percent_float32_targets_take_at_most_0_135_of_dense(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 500, generator=generator)
    mask = torch.zeros(100_000, dtype=torch.bool)
    mask[torch.randperm(100_000, generator=generator)[:10_000]] = True
    mask = mask.view(200, 500)
    tensors, masks = {"w": where(mask, weight), "bias": torch.zeros(200)}, {"w": mask}
    size = sparse_size(tensors, masks)
    assert size.fraction == 0.13125
    assert (size.dense_target_bytes, size.target_bytes, size.other_bytes) == (400_000, 52_500, 800)
    save_sparse(tmp_path / "f", tensors, masks)
    assert (tmp_path / "f").stat().st_size <= 0.135 * 400_000 + 800
    assert sparse_size(tensors, {}).fraction == 1.0


def test_a_dense_file_is_plain_safetensors(tmp_path, network, same_bits):
    state = network.state_dict()
    save_dense(tmp_path / "f", state, card={"a": 1})
    same_bits(load_dense(tmp_path / "f"), dict(state))
    same_bits(load_sparse(tmp_path / "f").tensors, dict(state))
    same_bits(load_file(tmp_path / "f"), {name: state[name] for name in state if name != "head.weight"})
    assert load_masks(tmp_path / "f") == {}


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path, network):
    state = network.state_dict()
    save_dense(tmp_path / "f", state)
    found = load_dense(tmp_path / "f")
    assert found["head.weight"] is found["embedding.weight"]
    network.load_state_dict(found, strict=True)
    assert [name for name, _ in iter_sparse(tmp_path / "f")].count("head.weight") == 1
    assert (
        sparse_size(state, {}).other_bytes
        == sum(t.numel() * t.element_size() for t in network.state_dict().values()) - 120
    )


@pytest.mark.parametrize("masked", [("a",), ("b",), ("a", "b")])
def test_a_tied_sparse_tensor_is_stored_once_under_its_masked_name(tmp_path, masked):
    weight = torch.tensor([0.0, 2.0])
    save_sparse(tmp_path / "f", {"a": weight, "b": weight}, dict.fromkeys(masked, weight != 0))
    found = load_sparse(tmp_path / "f")
    assert found.tensors["a"] is found.tensors["b"]
    assert torch.equal(found.tensors["a"], weight)
    assert list(found.masks) == [masked[0]]
    assert load_file(tmp_path / "f").keys() == {f"{masked[0]}.bitmask", f"{masked[0]}.values"}


def test_views_of_one_memory_that_differ_are_stored_each(tmp_path, same_bits):
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "whole": whole,
        "row": whole[0],
        "turned": whole.T,
        "flat": whole.view(-1),
        "bits": whole.view(torch.int32),
    }
    save_dense(tmp_path / "f", tensors)
    same_bits(load_dense(tmp_path / "f"), tensors)
    assert len(load_file(tmp_path / "f")) == 5


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    save_dense(tmp_path / "f", {"w": torch.ones(4)})
    found = load_dense(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"")
    found["w"].add_(1)
    assert found["w"].tolist() == [2, 2, 2, 2]


def test_lazy_reading_holds_one_tensor_at_a_time(tmp_path):
    names = [f"w{index}" for index in range(3)]
    save_sparse(tmp_path / "f", {name: torch.ones(2) for name in names}, {"w1": torch.ones(2, dtype=torch.bool)})
    tensors = iter_sparse(tmp_path / "f")
    assert next(tensors)[0] == "w0"
    tensors.close()
    assert [name for name, _ in iter_sparse(tmp_path / "f")] == names


_ONES, _MASK = torch.ones(2), torch.tensor([True, False])


@pytest.mark.parametrize(
    ("tensors", "masks", "message"),
    [
        ({"w": _ONES}, {"w": _MASK}, r"pruned elements that are not zero would be lost: w \(1\)"),
        ({"w": _ONES * float("nan")}, {"w": ~_MASK}, r"pruned elements that are not zero would be lost: w \(1\)"),
        ({"weight": _ONES}, {"weigth": _MASK}, "no tensor of the name weigth; did you mean 'weight'"),
        ({"w": _ONES}, {"w": _MASK[:1]}, r"mask of w should be \(2,\), torch.bool; got \(1,\), torch.bool"),
        ({"w": _ONES}, {"w": _MASK.int()}, r"mask of w should be \(2,\), torch.bool; got \(2,\), torch.int32"),
        ({"w": _ONES.int()}, {"w": _MASK}, "w has a mask and dtype torch.int32; expected one of float64"),
        ({"w": _ONES, "w.values": _ONES.clone()}, {"w": _MASK | True}, "under the name 'w.values': it is taken"),
        ({"__metadata__": _ONES}, {}, "under the name '__metadata__': it is taken or not text"),
        ({"\ud800": _ONES}, {}, r"under the name '\\ud800': it is taken or not text"),
        ({"w": torch.ones(2, device="meta")}, {}, "w has no values: it is on the meta device"),
        ({"w": _ONES.to_sparse()}, {}, "w is a Tensor of layout torch.sparse_coo; only plain tensors"),
        ({"w": _ONES.to(torch.complex128)}, {}, "w has dtype torch.complex128, which safetensors files cannot hold"),
        ({"w": {"extra": 1}}, {}, "w is a <class 'dict'>; only plain tensors"),
    ],
)
def test_what_would_not_come_back_is_refused_and_nothing_written(tmp_path, tensors, masks, message):
    with pytest.raises(StateError, match=message):
        save_sparse(tmp_path / "f", tensors, masks)
    assert list(tmp_path.iterdir()) == []


def test_two_masks_of_one_tied_tensor_have_to_agree(tmp_path):
    zero = torch.zeros(2)
    with pytest.raises(StateError, match="b and a are one tensor with two different masks"):
        save_sparse(tmp_path / "f", {"a": zero, "b": zero}, {"a": _MASK, "b": ~_MASK})


def test_a_card_that_is_no_plain_data_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"metadata\['card'\]\['loss'\] is nan"):
        save_dense(tmp_path / "f", {}, card={"loss": float("nan")})


def test_a_sparse_file_is_not_read_as_a_dense_one(tmp_path):
    save_sparse(tmp_path / "f", {"w": _ONES * _MASK}, {"w": _MASK})
    with pytest.raises(CheckpointError, match="holds 1 sparse tensors; read it with load_sparse"):
        load_dense(tmp_path / "f")
