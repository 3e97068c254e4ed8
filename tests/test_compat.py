"""Names without wrappers' prefixes, and counts of tensors that are spread over processes."""

import os
from datetime import timedelta

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from sparsetwin._compat import canonical_name, is_capturing, local, named_weights, total
from sparsetwin.masking import apply_masks_, count_kept, count_pruned_nonzero


class Holder(nn.Module):
    """A model with children that are called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2, bias=False))
        self.submodule = nn.Linear(2, 2, bias=False)


class OwnDataParallel(nn.DataParallel):
    """What users derive keeps the prefix of its base."""


NAMES = ["module.0.weight", "submodule.weight"]


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.submodule = checkpoint_wrapper(model.submodule)
    return checkpoint_wrapper(model)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.module[0] = compiled(model.module[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        OwnDataParallel,
        lambda model: nn.DataParallel(nn.DataParallel(model)),
        compiled,
        lambda model: compiled(OwnDataParallel(model)),
        compiled_inside,
        checkpointed,
        lambda model: nn.DataParallel(compiled(checkpointed(model))),
    ],
)
def test_the_names_of_a_wrapped_model_are_those_of_the_bare_one(wrap):
    model = Holder()
    parameters = list(model.parameters())
    wrapped = wrap(model)
    weights = named_weights(wrapped)
    assert list(weights) == NAMES
    assert all(weight is parameter for weight, parameter in zip(weights.values(), parameters, strict=True))
    assert [canonical_name(name, wrapped) for name, _ in wrapped.named_parameters()] == NAMES


def test_a_name_that_the_model_does_not_have_stays_as_it_is():
    assert canonical_name("head.module.weight", Holder()) == "head.module.weight"
    assert canonical_name("submodule.weight", nn.DataParallel(Holder())) == "submodule.weight"


def test_a_shared_parameter_is_named_once_by_its_first_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(named_weights(nn.DataParallel(model))) == ["0.weight"]


def test_an_ordinary_tensor_is_its_own_local_part_and_its_count_a_number():
    tensor = torch.ones(3)
    assert local(tensor) is tensor
    assert total(tensor.count_nonzero()) == 3


def test_no_graph_is_being_captured_outside_a_capture():
    assert is_capturing() is False


def mask_one_half(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    try:
        mesh = init_device_mesh("cpu", (2,))
        weight, mask = torch.arange(5.0) + 1, torch.tensor([True, False, True, True, False])
        sharded, masks = distribute_tensor(weight, mesh, [Shard(0)]), {"w": distribute_tensor(mask, mesh, [Shard(0)])}
        assert local(sharded).tolist() == [[1, 2, 3], [4, 5]][rank]
        assert total(masks["w"].count_nonzero()) == count_kept(masks) == 3
        assert count_pruned_nonzero({"w": sharded}, masks) == {"w": 1}  # each process looks at its own part
        apply_masks_({"w": sharded}, masks)
        assert count_pruned_nonzero({"w": sharded}, masks) == {}
        assert sharded.full_tensor().tolist() == [1, 0, 3, 4, 0]
    finally:
        distributed.destroy_process_group()


def mask_second_half(_, folder):
    mask_one_half(1, folder)
    os._exit(0)  # a mesh keeps gloo's threads alive, which may abort in the interpreter's end: pytorch/pytorch#190489


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_mask_their_own_parts_and_count_the_whole(tmp_path):
    other = multiprocessing.spawn(mask_second_half, args=(str(tmp_path),), nprocs=1, join=False)
    mask_one_half(0, str(tmp_path))
    other.join()
