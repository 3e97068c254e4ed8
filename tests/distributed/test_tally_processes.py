"""Weights that passes compute with, counted on copies and on shards."""

import torch
from processes import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.training import Processes
from sparsetwin.training.tally import Tally

METHODS = {
    "cram": st.CrAM(schedule=st.schedules.phases([(5, 0.0)]), rho=0.5, sparsities=(0.4, 0.8)),
    "topkast": st.TopKAST(schedule=st.schedules.phases([(5, 0.8)]), backward_sparsity=0.5, distribution=st.Global()),
}
KINDS = ("ddp", "fsdp2")
SAMPLES = 16


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def counted(name: str, kind: str, *, rank: int) -> tuple[list[list[dict[str, int]]], list[list[dict[str, int]]]]:
    """Train a few steps; return the tally's counts of each pass, and those of whole tensors at every pass."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 3))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    method, optimizer = METHODS[name], torch.optim.SGD(model.parameters(), 0.5)
    sparsifier = st.Sparsifier(method, model, optimizer)
    tally = Tally(sparsifier, Processes(rank=rank, count=2))
    expected: list[list[dict[str, int]]] = []

    def look(number: int) -> None:
        tally.count()
        masks = sparsifier.gradient_masks or sparsifier.weights  # CrAM updates what a pass computes with
        for kind, tensors in enumerate((sparsifier.weights, masks)):
            sums = expected[number][kind]
            for target, tensor in tensors.items():
                sums[target] = sums.get(target, 0) + SAMPLES * int(whole(tensor.detach()).count_nonzero())

    for step in range(5):
        tally.begin_step()
        passes = 0

        def closure(step: int = step) -> Tensor:
            nonlocal passes
            if passes == len(expected):
                expected.append([{}, {}])
            look(passes)
            passes += 1
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(SAMPLES, 13, generator=generator).chunk(2)[rank]
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        sparsifier.backward(closure)
        optimizer.step()
        optimizer.zero_grad()
        tally.add(SAMPLES, passes=passes)
        if step == 2:
            state, tally = tally.state_dict(), Tally(sparsifier, Processes(rank=rank, count=2))
            tally.load_state_dict(state)
    assert tally.samples == 5 * SAMPLES
    return [[dict(each.nonzero), dict(each.updated)] for each in tally.take()], expected


def in_a_process(rank: int) -> dict[str, object]:
    return {f"{name} {kind}": counted(name, kind, rank=rank) for name in METHODS for kind in KINDS}


def test_counts_are_those_of_whole_weights_in_every_process(tmp_path):
    first, second = run(in_a_process, 2, tmp_path)
    assert first == second
    for name, (found, expected) in first.items():
        assert found == expected, name
        assert len(found) == (2 if name.startswith("cram") else 1)
        assert found[-1][0]["0.weight"] < 5 * SAMPLES * 13 * 17
