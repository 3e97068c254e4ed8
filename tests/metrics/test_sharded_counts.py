"""Counts of sharded weights and masks are those of the whole tensors, on every process."""

import os

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from sparsetwin.metrics import LayerSparsity, MaskChange, mask_change, nonzero_counts, sparsity_table

WEIGHT = torch.tensor([1.0, 0.0, 2.0, 3.0, 0.0])
BEFORE = torch.tensor([True, True, False, True, False])
NOW = torch.tensor([True, False, True, True, False])


def count_on_two_processes(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    weight, before, now = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (WEIGHT, BEFORE, NOW))
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    assert nonzero_counts(model) == {"weight": 3}
    assert sparsity_table(model, {"weight": now}, ["weight"]) == [
        LayerSparsity(name="weight", size=5, kept=3, nonzero=3)
    ]
    assert mask_change({"w": before}, {"w": now}) == MaskChange(size=5, kept_before=3, kept_now=3, kept_both=2)
    distributed.destroy_process_group()
    os._exit(0)  # a mesh keeps gloo's threads alive, which may abort in the interpreter's end: pytorch/pytorch#190489


def test_two_processes_count_the_whole_tensors(tmp_path):
    multiprocessing.spawn(count_on_two_processes, args=(str(tmp_path),), nprocs=2)
