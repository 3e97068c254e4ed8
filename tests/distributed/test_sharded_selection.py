"""Masks chosen from sharded weights are those chosen from whole ones, whatever the sharding."""

import pytest
import torch
from processes import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from sparsetwin._sharding import Layout, global_indices
from sparsetwin.distributions import Global, Uniform
from sparsetwin.selection import select_masks

SPARSITIES = (0.5, 0.9, 0.98)
DTYPES = (torch.float32, torch.bfloat16)


def weights(kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {
        "a": torch.randn(24, 30, generator=generator),
        "b": torch.randn(3, 7, generator=generator) * 0.01,  # fewer rows than processes: some shards are empty
        "c": torch.randn(16, 4, 3, 3, generator=generator),
    }
    if kind == "equal":
        made = {name: torch.ones_like(weight) for name, weight in made.items()}
    if kind == "rounded":
        made = {name: (weight * 2).round() for name, weight in made.items()}
    return {name: weight.to(dtype) for name, weight in made.items()}


LAYOUTS = {
    "rows": ((), [Shard(0)]),
    "columns": ((), [Shard(1)]),
    "replicated": ((), [Replicate()]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "both axes": ((2, 2), [Shard(0), Shard(1)]),
    "fsdp after tensor parallel": ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
}


def compare(rank: int, world_size: int) -> list[str]:
    wrong: list[str] = []
    for name, (shape, placements) in LAYOUTS.items():
        if shape and world_size != 4:
            continue
        mesh = init_device_mesh("cpu", shape or (world_size,), mesh_dim_names=("x", "y")[: len(shape) or 1])
        for kind in ("random", "equal", "rounded"):
            for dtype in DTYPES:
                whole = weights(kind, dtype)
                sharded = {n: distribute_tensor(w, mesh, placements, src_data_rank=None) for n, w in whole.items()}
                for n, weight in sharded.items():
                    held = weight.to_local().reshape(-1)
                    if not torch.equal(held, whole[n].reshape(-1)[global_indices(weight)]):
                        wrong.append(f"{name}: indices of {n}")
                for sparsity in SPARSITIES:
                    for distribution in (Global(), Uniform()):
                        budgets = distribution.budgets({n: w.shape for n, w in whole.items()}, sparsity)
                        expected = select_masks(whole, lambda n, w=whole: w[n].abs(), budgets)
                        found = select_masks(sharded, lambda n, w=sharded: w[n].abs(), budgets)
                        for n, mask in found.items():
                            here = expected[n].reshape(-1)[global_indices(sharded[n])]
                            if not torch.equal(mask.to_local().reshape(-1), here):
                                wrong.append(f"{name}, {kind}, {dtype}, {sparsity}, {distribution}: {n}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_selection_keeps_what_selection_on_whole_weights_keeps(world_size, tmp_path):
    assert run(compare, world_size, tmp_path, world_size) == [[]] * world_size


def count_bytes(rank: int) -> dict[str, int]:
    mesh = init_device_mesh("cpu", (2,))
    whole = {f"layer{i}": torch.randn(64, 129, generator=torch.Generator().manual_seed(i)) for i in range(5)}
    whole["ties"] = torch.ones(64, 128)
    sharded = {n: distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for n, w in whole.items()}
    sent = [0]
    plain = Layout.all_reduce

    def counted(self, tensor):
        sent[0] += tensor.numel() * tensor.element_size()
        plain(self, tensor)

    Layout.all_reduce = counted
    found: dict[str, int] = {}
    for distribution in (Global(), Uniform()):
        sent[0] = 0
        budgets = distribution.budgets({n: w.shape for n, w in whole.items()}, 0.9)
        select_masks(sharded, lambda n: sharded[n].abs(), budgets)
        found[type(distribution).__name__] = sent[0]
    return found | {"layers": len(whole)}


def test_a_global_selection_moves_at_most_2_mb_and_a_layer_of_its_own_64_kb(tmp_path):
    for found in run(count_bytes, 2, tmp_path):
        assert 0 < found["Global"] <= 2_000_000
        assert 0 < found["Uniform"] <= 64_000 * found["layers"]


def select_nan(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    whole = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}
    whole["b"][7, 7] = torch.nan  # on the last process only
    sharded = {n: distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for n, w in whole.items()}
    try:
        select_masks(sharded, lambda n: sharded[n].abs(), Global().budgets({n: w.shape for n, w in whole.items()}, 0.5))
    except ValueError as error:
        return str(error)
    return ""


def test_nan_on_one_process_is_refused_on_all(tmp_path):
    assert all("b" in message and "NaN" in message for message in run(select_nan, 2, tmp_path))
