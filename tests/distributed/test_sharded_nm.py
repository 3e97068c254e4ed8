"""N:M on weights that are spread over processes: the same masks where groups stay whole, an error where they do not."""

import pytest
import torch
from processes import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sparsetwin.distributions import Global
from sparsetwin.patterns import NM, Block, Channel
from sparsetwin.selection import select_masks

WORLD_SIZE = 3  # 10 rows are cut unevenly, a single one leaves two processes empty
SHAPES = {"fc": (10, 16), "conv": (6, 8, 3, 3), "row": (1, 8)}


def whole_weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).round(decimals=1) for name, shape in SHAPES.items()}


def by_magnitude(weights):
    return lambda name: weights[name].abs()


def compare():
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    whole = whole_weights()
    budgets = Global().budgets(SHAPES, 0.5)
    expected = select_masks(whole, by_magnitude(whole), budgets, pattern=NM(2, 4))
    found = {}
    for placement in (Shard(0), Replicate()):
        spread = {n: distribute_tensor(w, mesh, [placement], src_data_rank=None) for n, w in whole.items()}
        for some in ({}, {"row": whole["row"]}):  # beside a weight that is no DTensor, too
            masks = select_masks(spread | some, by_magnitude(spread | some), budgets, pattern=NM(2, 4))
            same = {n: m.full_tensor() if hasattr(m, "full_tensor") else m for n, m in masks.items()}
            found[f"{placement} {len(some)}"] = all(torch.equal(same[n], expected[n]) for n in SHAPES)
            found[f"{placement} {len(some)} cut"] = masks["fc"].placements == (placement,)
    return found


def refuse():
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    messages = []
    both_ways = NM(2, 4, transposable=True)
    for placement, pattern in (
        (Shard(1), NM(2, 4)),
        (Shard(0), both_ways),
        (Shard(0), Block(1, 4)),
        (Replicate(), Channel(1)),
    ):
        spread = {"layer": distribute_tensor(torch.ones(8, 16), mesh, [placement], src_data_rank=None)}
        try:
            select_masks(spread, by_magnitude(spread), Global().budgets({"layer": (8, 16)}, 0.5), pattern=pattern)
        except RuntimeError as error:
            messages.append(str(error))
    broken = torch.ones(8, 16)
    broken[7, 7] = torch.nan  # on the last process only
    spread = {"layer": distribute_tensor(broken, mesh, [Shard(0)], src_data_rank=None)}
    try:
        select_masks(spread, by_magnitude(spread), Global().budgets({"layer": (8, 16)}, 0.5), pattern=NM(2, 4))
    except ValueError as error:
        messages.append(str(error))
    return messages


def both(rank):
    return compare(), refuse()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(both, WORLD_SIZE, tmp_path_factory.mktemp("processes"))


def test_nm_of_weights_cut_along_outputs_is_that_of_whole_weights(found):
    for compared, _ in found:
        assert len(compared) == 8
        assert all(compared.values()), compared


def test_what_processes_cannot_choose_by_themselves_and_nan_are_refused_on_each(found):
    for _, (*cuts, nan) in found:
        assert len(cuts) == 4
        assert all("layer is a DTensor" in message and "NM(n, m) on weights that are" in message for message in cuts)
        assert nan == "1 of the 128 scores of layer are NaN"
