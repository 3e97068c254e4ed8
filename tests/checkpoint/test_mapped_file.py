"""A file that stays on the disk: views of it, one dense tensor at a time, and a model filled from the meta device."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsetwin.checkpoint import Pair, SparseFile, load_sparse, save_dense, save_sparse
from sparsetwin.errors import CheckpointError, StateError, UsageError
from sparsetwin.masking import pack_mask


@pytest.fixture
def saved(tmp_path, pruned, sparse_view):
    """The pruned network in a file."""
    save_sparse(tmp_path / "f", pruned.state_dict(), sparse_view.masks, card={"step": 20})
    return tmp_path / "f"


def test_the_header_tells_everything_but_the_values(saved, pruned, sparse_view):
    with SparseFile.open(saved) as file:
        assert set(file.names) == set(pruned.state_dict())
        assert set(file.sparse_names) == set(sparse_view.masks)
        assert file.card == {"step": 20}
        for name, tensor in pruned.state_dict().items():
            assert (file.shape(name), file.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            mask = sparse_view.masks.get(name)
            assert file.encoding(name) == ("dense" if mask is None else "bitmask")
            assert file.kept(name) == (tensor.numel() if mask is None else int(mask.sum()))
        assert file.owner("head.weight") == file.owner("embedding.weight")


def test_bits_values_and_dense_tensors_are_those_that_were_saved(saved, pruned, sparse_view, same_bits):
    with SparseFile.open(saved) as file:
        for name, mask in sparse_view.masks.items():
            assert torch.equal(file.mask_bits(name), pack_mask(mask))
            assert torch.equal(file.mask(name), mask)
            assert torch.equal(file.values(name), pruned.state_dict()[name][mask])
            assert file.scales(name) is None
        same_bits({name: file.dense(name) for name in file.names}, pruned.state_dict())
        same_bits(dict(file.items()), pruned.state_dict())


def test_int8_parts_are_handed_out_as_they_are_stored(tmp_path, pruned, sparse_view):
    save_sparse(tmp_path / "f", pruned.state_dict(), sparse_view.masks, values="int8")
    parts = load_file(tmp_path / "f")
    with SparseFile.open(tmp_path / "f") as file:
        assert file.encoding("conv.weight") == "bitmask-int8"
        assert torch.equal(file.values("conv.weight"), parts["conv.weight.values"])
        assert torch.equal(file.scales("conv.weight"), parts["conv.weight.scales"])


def test_parts_are_views_of_the_mapped_file_and_outlive_it(saved, pruned, sparse_view):
    file = SparseFile.open(saved)
    first, again = file.values("linear.weight"), file.values("linear.weight")
    assert first.data_ptr() == again.data_ptr()  # one mapping, no copy
    assert file.dense("linear.weight").data_ptr() != file.dense("norm.weight").data_ptr()
    saved.unlink()
    file.close()
    assert torch.equal(first, pruned.linear.weight[sparse_view.masks["linear.weight"]])


def test_a_file_that_is_replaced_while_it_is_mapped_stays_the_old_one(saved, pruned, sparse_view, same_bits):
    with SparseFile.open(saved) as file:
        save_sparse(saved, {"other": torch.ones(3)}, {})
        same_bits(dict(file.items()), pruned.state_dict())


def test_only_the_tensor_that_the_caller_holds_exists(tmp_path):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:8] = True
    save_sparse(tmp_path / "f", {f"w{i}": mask * float(i) for i in range(1, 9)}, {f"w{i}": mask for i in range(1, 9)})
    with SparseFile.open(tmp_path / "f") as file:
        earlier: list[weakref.ref[torch.Tensor]] = []
        for index, (name, tensor) in enumerate(file.items(), start=1):
            gc.collect()
            assert all(reference() is None for reference in earlier[:-1]), name
            assert earlier == [] or earlier[-1]() is None, name
            assert float(tensor[0, 0]) == index
            earlier.append(weakref.ref(tensor))
            del tensor
        assert len(earlier) == 8


_READ = """
import sys
import torch
from pathlib import Path
from sparsetwin.checkpoint import SparseFile, load_sparse

def kibibytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

path, how = sys.argv[1:]
torch.set_num_threads(1)
with SparseFile.open(path) as file:  # what is loaded on first use is loaded
    file.dense(file.names[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
start = kibibytes("VmRSS")
if how == "whole":
    tensors = load_sparse(path).tensors
else:
    with SparseFile.open(path) as file:
        for name, tensor in file.items():
            del tensor
print(1024 * (kibibytes("VmHWM") - start))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_reading_one_by_one_takes_the_memory_of_one_layer_and_the_file(tmp_path):
    layers, elements = 32, 2**20  # 4 MiB dense each, 128 MiB in all
    mask = torch.zeros(1024, 1024, dtype=torch.bool)
    mask[:, ::32] = True
    weights = {f"w{index:02}": mask * torch.full((), 1.0 + index) for index in range(layers)}
    save_sparse(tmp_path / "f", weights, dict.fromkeys(weights, mask))
    del weights

    def peak(how):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _READ, str(tmp_path / "f"), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    whole, one = peak("whole"), peak("one by one")
    assert whole > 0.9 * layers * 4 * elements  # so the measurement sees what it should
    assert one < 0.3 * layers * 4 * elements  # the file, which is mapped, and two or three masks are most of it


class Buffered(nn.Module):
    """A model with a buffer that its state does not hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("positions", torch.arange(2), persistent=False)


def on_meta(make):
    with torch.device("meta"):
        return make()


def test_a_model_on_the_meta_device_gets_the_files_tensors_and_stays_tied(saved, network, pruned, same_bits):
    model = on_meta(type(network))
    model.linear.weight.requires_grad_(False)
    with SparseFile.open(saved) as file:
        assert file.load_into(model) is model
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    same_bits(model.state_dict(), pruned.state_dict())
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.conv.weight, nn.Parameter)
    assert model.conv.weight.requires_grad
    assert not model.linear.weight.requires_grad
    images = torch.randn(3, 2, 5, 5)
    assert torch.equal(model.eval()(images), copy.deepcopy(pruned).eval()(images))


def test_a_model_in_memory_keeps_its_tensors_and_gets_the_values(saved, network, pruned, same_bits):
    before = dict(network.named_parameters())
    with SparseFile.open(saved) as file:
        file.load_into(network)
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
    same_bits(network.state_dict(), pruned.state_dict())


def test_what_is_stored_dense_may_stay_in_the_mapped_file_and_the_rest_be_something_else(saved, network, pruned):
    model, asked = on_meta(type(network)), []

    def stand_in(name):
        asked.append(name)
        return torch.full(tuple(pruned.state_dict()[name].shape), 7.0)

    with SparseFile.open(saved) as file:
        file.load_into(model, views=True, sparse=stand_in)
        with pytest.raises(StateError, match=r"other.weight is missing; other.bias is missing"):
            file.check_fits(nn.ModuleDict({"embedding": nn.Embedding(3, 4), "other": nn.Linear(2, 2)}))
        assert sorted(asked) == sorted({file.owner(name) for name in file.sparse_names})
        again = on_meta(type(network))
        file.load_into(again, views=True, sparse=stand_in)
        assert again.norm.weight.data_ptr() == model.norm.weight.data_ptr()  # one mapping, no copy
        file.load_into(again := on_meta(type(network)), views=True, dtype=torch.float64)
        assert torch.equal(again.norm.weight, pruned.norm.weight.double())
    assert torch.equal(model.norm.weight, pruned.norm.weight)
    assert bool((model.conv.weight == 7).all())
    assert model.head.weight is model.embedding.weight


def test_a_wished_dtype_becomes_the_models(tmp_path):
    linear = nn.Linear(3, 4)
    save_dense(tmp_path / "f", linear.state_dict())
    model = on_meta(lambda: nn.Linear(3, 4))
    with SparseFile.open(tmp_path / "f") as file:
        file.load_into(model, dtype=torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.weight, linear.weight.bfloat16())


def test_what_is_tied_in_the_file_only_becomes_two_tensors(tmp_path):
    weight = torch.randn(3, 3)
    save_dense(tmp_path / "f", {"0.weight": weight, "1.weight": weight})
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)))
    with SparseFile.open(tmp_path / "f") as file:
        file.load_into(model)
    assert torch.equal(model[0].weight, model[1].weight)
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(model[1].weight, weight)


def test_a_model_that_the_file_does_not_fit_is_refused_and_left_as_it_was(saved, network):
    model = on_meta(type(network))
    model.extra = nn.Linear(2, 2)
    with SparseFile.open(saved) as file, pytest.raises(StateError, match=r"extra.weight is missing"):
        file.load_into(model)
    assert model.conv.weight.is_meta
    with SparseFile.open(saved) as file, pytest.raises(StateError, match=r"conv.bias is \(4,\) torch.float32, the"):
        file.load_into(on_meta(lambda: type(network)().half()))


def test_a_buffer_that_no_file_holds_is_named(tmp_path):
    save_dense(tmp_path / "f", Buffered().state_dict())
    with SparseFile.open(tmp_path / "f") as file:
        with pytest.raises(StateError, match="cannot fill positions: buffers that are not part of the state_dict"):
            file.load_into(on_meta(Buffered))
        file.load_into(Buffered())


def test_a_pairs_member_is_opened_when_it_is_the_one_that_was_saved(tmp_path, pruned, sparse_view):
    pair = Pair(tmp_path)
    member = pair.save(pruned, sparse_view)
    with pair.open("sparse") as file:
        assert torch.equal(file.dense("conv.weight"), pruned.conv.weight)
    content = bytearray((tmp_path / member.file).read_bytes())
    content[-1] ^= 1
    (tmp_path / member.file).write_bytes(content)
    with pytest.raises(CheckpointError, match="corrupted"):
        pair.open("sparse")


def test_damage_is_found_when_the_damaged_part_is_read_and_not_before(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1  # the last byte of what has the narrowest dtype: some bits
    saved.write_bytes(content)
    with SparseFile.open(saved) as file:
        assert file.card == {"step": 20}
        damaged = [name for name in file.sparse_names if not _is_whole(file, name)]
        assert len(damaged) == 1
    with pytest.raises(CheckpointError, match=r"f is corrupted: the checksum of .*\.bitmask"):
        load_sparse(saved)


def _is_whole(file, name):
    try:
        file.mask_bits(name)
    except CheckpointError:
        return False
    return True


def test_wrong_calls_are_named(saved):
    file = SparseFile.open(saved)
    with pytest.raises(CheckpointError, match=r"has no tensor 'conv.wieght'; did you mean 'conv.weight'"):
        file.dense("conv.wieght")
    for read in (file.values, file.mask_bits, file.mask, file.scales):
        with pytest.raises(CheckpointError, match=r"stores norm.weight dense, without bits and values"):
            read("norm.weight")
    file.close()
    file.close()
    with pytest.raises(UsageError, match="was closed; open it again"):
        file.dense("conv.weight")
    for path in (saved.parent / "absent", saved.parent):
        with pytest.raises(CheckpointError, match=r"does not exist|cannot read|truncated"):
            SparseFile.open(path)
