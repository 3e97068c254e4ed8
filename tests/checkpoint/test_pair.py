import copy
import json
import random

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from sparsetwin.checkpoint import Member, Pair, load_sparse
from sparsetwin.checkpoint._atomic import sha256_of
from sparsetwin.errors import CheckpointError, StateError


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path / "run" / "pair")


@pytest.fixture
def saved(pair, network, pruned, dense_view, sparse_view):
    """A pair with both halves."""
    pair.save(network, dense_view, metrics={"accuracy": 0.75})
    pair.save(pruned, sparse_view, metrics={"accuracy": 0.5})
    return pair


def other(network):
    """A model of the same architecture with other weights and statistics."""
    other = copy.deepcopy(network)
    for tensor in other.state_dict().values():
        tensor.fill_(9)
    return other


def test_both_halves_come_back_with_every_bit_of_parameters_and_buffers(saved, network, pruned, sparse_view, same_bits):
    model = other(network)
    before = copy.deepcopy(model.state_dict())
    dense, sparse = saved.dense(model), saved.sparse(model)
    same_bits(dense.state_dict(), network.state_dict())
    same_bits(sparse.state_dict(), pruned.state_dict())
    same_bits(model.state_dict(), before)  # the given model is not changed
    assert sparse.head.weight is sparse.embedding.weight
    assert not torch.equal(dense.norm.running_mean, torch.zeros(4))
    same_bits(saved.masks("sparse"), sparse_view.masks)
    assert saved.masks("dense") == {}
    saved.verify()


def test_members_are_listed_with_what_they_are(saved, sparse_view):
    kept = sum(int(mask.sum()) for mask in sparse_view.masks.values())
    dense, sparse = saved.members["dense"], saved.members["sparse"]
    assert list(saved.members) == ["dense", "sparse"]
    assert (dense.sparsity, dense.step, dense.kept, dense.targets) == (0.0, 10, 92, 92)
    assert (sparse.sparsity, sparse.step, sparse.kept, sparse.targets) == (1 - kept / 92, 20, kept, 92)
    assert (dense.file, sparse.file) == ("dense.safetensors", "sparse.safetensors")
    assert sparse.metrics == {"accuracy": 0.5}
    for member in (dense, sparse):
        assert member.sha256 == sha256_of(saved.folder / member.file)
    assert load_sparse(saved.folder / sparse.file).card == {
        "step": 20, "sparsity": sparse.sparsity, "kept": kept, "targets": 92
    }  # fmt: skip
    listed = json.loads((saved.folder / "pair.json").read_text())
    assert [Member(**member) for member in listed["members"]] == [dense, sparse]
    assert sorted(path.name for path in saved.folder.iterdir()) == ["README.md", dense.file, "pair.json", sparse.file]


def test_equal_runs_give_equal_bytes(tmp_path, network, pruned, dense_view, sparse_view):
    folders = [tmp_path / "a", tmp_path / "somewhere" / "else"]
    for folder in folders:
        pair = Pair(folder)
        if folder == folders[1]:  # saved before, and in another order
            pair.save(pruned, sparse_view, metrics={"x": 1})
        pair.save(network, dense_view)
        pair.save(pruned, sparse_view, metrics={"b": 1, "a": 2})
    for name in ("pair.json", "dense.safetensors", "sparse.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_half_is_replaced_and_a_family_holds_more(saved, network, pruned, sparse_view, dense_view, same_bits):
    saved.save(network, dense_view, name="dense-raw")
    saved.save(pruned, sparse_view, name="sparse-0.95")
    with torch.no_grad():
        network.conv.bias.add_(1)
    saved.save(network, dense_view)
    same_bits(saved.dense(pruned).state_dict(), network.state_dict())
    assert list(saved.members) == ["dense", "dense-raw", "sparse", "sparse-0.95"]
    assert saved.members["dense"].sha256 != saved.members["dense-raw"].sha256
    assert saved.members["sparse"].sha256 == saved.members["sparse-0.95"].sha256
    assert saved.members["dense"].metrics == {}
    saved.verify()


def compiled(model):
    return torch.compile(model, backend="eager")


class Wrapped(nn.Module):
    """A model with a child called module, as its own choice."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


@pytest.mark.parametrize("wrap", [DataParallel, compiled, lambda model: compiled(DataParallel(model))])
def test_wrappers_leave_no_trace(pair, network, pruned, sparse_view, wrap, same_bits):
    pair.save(wrap(pruned), sparse_view)
    plain = pair.sparse(network)
    assert type(plain) is type(network)
    same_bits(plain.state_dict(), pruned.state_dict())
    unwrapped = pair.sparse(wrap(other(network)))
    assert type(unwrapped) is type(network)
    same_bits(unwrapped.state_dict(), pruned.state_dict())


def test_a_wrapped_part_of_a_model_keeps_its_place(pair, network, dense_view, same_bits):
    plain = copy.deepcopy(network.state_dict())
    network.conv = compiled(network.conv)
    pair.save(network, dense_view)
    same_bits(load_sparse(pair.folder / "dense.safetensors").tensors, dict(plain))
    assert pair.dense(network).conv is not network.conv


def test_a_models_own_child_called_module_is_no_wrapper(pair, dense_view):
    model = Wrapped()
    view = type(dense_view)(1, target_names=("module.weight",))
    pair.save(model, view)
    assert isinstance(pair.dense(model), Wrapped)
    assert load_sparse(pair.folder / "dense.safetensors").tensors.keys() == {"module.weight", "module.bias"}


def test_a_loaded_copy_has_the_mode_of_the_given_model(saved, network):
    assert not saved.dense(network.eval()).training
    assert saved.dense(network.train()).training


def test_metrics_are_added_and_replaced(saved):
    before = saved.members["sparse"]
    after = saved.annotate("sparse", {"accuracy": 0.6, "loss": None})
    assert after.metrics == {"accuracy": 0.6, "loss": None}
    assert saved.members["sparse"] == after
    assert (after.sha256, after.step) == (before.sha256, before.step)
    assert saved.members["dense"].metrics == {"accuracy": 0.75}
    with pytest.raises(CheckpointError, match=r"metrics\['loss'\] is inf"):
        saved.annotate("sparse", {"loss": float("inf")})
    with pytest.raises(
        CheckpointError, match=r"no member 'spares' in .*; members: dense, sparse; did you mean 'sparse'"
    ):
        saved.annotate("spares", {})


def test_a_member_is_renamed_and_copied(saved, network, pruned, same_bits):
    saved.copy("sparse", "sparse-best")
    saved.rename("dense", "dense-raw")
    assert list(saved.members) == ["dense-raw", "sparse", "sparse-best"]
    same_bits(saved.load("dense-raw", pruned).state_dict(), network.state_dict())
    same_bits(saved.load("sparse-best", network).state_dict(), pruned.state_dict())
    assert saved.members["sparse-best"].metrics == {"accuracy": 0.5}
    assert len(list(saved.folder.iterdir())) == 5
    saved.rename("sparse-best", "sparse-best")
    saved.copy("dense-raw", "sparse-best")  # in place of the member of that name
    saved.rename("dense-raw", "sparse")
    assert list(saved.members) == ["sparse", "sparse-best"]
    same_bits(saved.sparse(pruned).state_dict(), network.state_dict())
    saved.verify()
    assert len(list(saved.folder.iterdir())) == 4


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "-x", "Dense", "a b", "x" * 101, "a\\b", "é", "x\n"])
def test_names_that_could_be_paths_are_refused(pair, saved, network, dense_view, name):
    for call in (
        lambda: pair.save(network, dense_view, name=name),
        lambda: saved.rename("dense", name),
        lambda: saved.copy("dense", name),
    ):
        with pytest.raises(CheckpointError, match="a member's name holds lower-case letters"):
            call()
    assert len(list(pair.folder.parent.parent.rglob("*.safetensors"))) == 2


def test_an_empty_pair_has_no_members_and_says_so(pair, network):
    assert pair.members == {}
    pair.verify()
    with pytest.raises(CheckpointError, match=r"no member 'sparse' in .*; members: none"):
        pair.sparse(network)
    assert not pair.folder.exists()


def test_every_damaged_file_is_named(saved, network):
    content = bytearray((saved.folder / "sparse.safetensors").read_bytes())
    generator = random.Random(0)
    for _ in range(100):
        position, bit = generator.randrange(len(content)), generator.randrange(8)
        content[position] ^= 1 << bit
        (saved.folder / "sparse.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"sparse.safetensors of member 'sparse' is corrupted"):
            saved.sparse(network)
        content[position] ^= 1 << bit
    (saved.folder / "dense.safetensors").unlink()
    (saved.folder / "sparse.safetensors").write_bytes(content[:100])
    with pytest.raises(
        CheckpointError, match=r"the file of member 'dense' is missing: .*; .* of member 'sparse' is corr"
    ):
        saved.verify()
    for call in (lambda: saved.masks("sparse"), lambda: saved.copy("sparse", "x"), lambda: saved.rename("sparse", "x")):
        with pytest.raises(CheckpointError, match="of member 'sparse' is corrupted"):
            call()


def test_a_damaged_half_can_be_saved_anew(saved, network, pruned, sparse_view, same_bits):
    (saved.folder / "sparse.safetensors").write_bytes(b"")
    saved.save(pruned, sparse_view)
    same_bits(saved.sparse(network).state_dict(), pruned.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.__delitem__("conv"), r"conv.bias is not in the model.*conv.weight is not in the model"),
        (lambda m: setattr(m, "extra", nn.Linear(1, 1)), "extra.weight is missing; extra.bias is missing"),
        (lambda m: m.half(), r"conv.weight is .* torch.float32, .* torch.float16; .* and \d+ more"),
        (lambda m: setattr(m, "conv", nn.Conv2d(2, 5, 3)), r"conv.weight is \(4, 2, 3, 3\) .* model's \(5, 2, 3, 3\)"),
    ],
)
def test_a_member_of_another_architecture_is_refused_and_the_difference_named(saved, network, change, message):
    model = nn.ModuleDict(network.named_children()) if "is not in" in message else network
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=rf"the member 'dense' of .* does not fit the model: .*{message}"):
        saved.dense(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_pruned_weights_that_are_not_zero_are_never_lost(saved, network, sparse_view):
    before = (saved.folder / "pair.json").read_bytes()
    with pytest.raises(
        StateError, match=r"pruned elements that are not zero would be lost: conv.weight \(\d+\), linear"
    ):
        saved.save(network, sparse_view)
    assert (saved.folder / "pair.json").read_bytes() == before
    saved.verify()


def test_a_sparsifier_of_another_model_is_refused(pair, pruned, sparse_view):
    with pytest.raises(StateError, match="belongs to another model: other is not among"):
        pair.save(pruned, type(sparse_view)(1, target_names=("other",)))
    with pytest.raises(StateError, match=r"belongs to another model: linear.weight is not among"):
        pair.save(pruned, type(sparse_view)(1, sparse_view.masks, target_names=("conv.weight",)))
    assert not pair.folder.exists()


def test_metrics_that_are_no_plain_data_are_refused_before_anything_is_written(pair, network, dense_view):
    with pytest.raises(CheckpointError, match=r"metrics\['loss'\] is nan"):
        pair.save(network, dense_view, metrics={"loss": float("nan")})
    assert not pair.folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(version=2), "has version 2, this library reads version 1"),
        (lambda p: p.pop("version"), "describes no pair"),
        (lambda p: p.update(members={}), "should list its members"),
        (lambda p: p.update(members=[3]), "a member has file, kept, .*; got 3"),
        (lambda p: p["members"].append(p["members"][0]), "names a member twice"),
        (lambda p: p["members"][0].update(file="../../x"), "a member with impossible values"),
        (lambda p: p["members"][0].update(name="../x", file="../x.safetensors"), "a member's name holds"),
        (lambda p: p["members"][0].update(sha256="0"), "a member with impossible values"),
        (lambda p: p["members"][0].update(step=1.5), "a member with impossible values"),
        (lambda p: p["members"][0].update(metrics=[]), "a member with impossible values"),
        (lambda p: p["members"][0].update(sparsity="0"), "a member with impossible values"),
        (lambda p: p["members"][0].update(more=1), "a member has file, kept"),
        (lambda p: p.update(switching_to=3), "should list its members, got 3"),
    ],
)
def test_a_pair_json_that_was_tampered_with_is_refused(saved, change, message):
    path = saved.folder / "pair.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        _ = saved.members


def test_a_truncated_pair_json_is_refused(saved, network, dense_view):
    path = saved.folder / "pair.json"
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 13):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"pair.json is not valid JSON"):
            saved.save(network, dense_view)
