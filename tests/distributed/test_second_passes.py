"""Methods that pass over a batch again, or over sample batches, on several processes."""

import torch
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetwin as st
from sparsetwin.errors import UsageError

CRAM = st.CrAM(
    schedule=st.schedules.phases([(5, 0.0), (2, 0.8)]), rho=0.5, sparsities=(0.4, 0.8), ham=st.HAM(alpha=2.0)
)
WOODFISHER = st.WoodFisher(
    schedule=st.schedules.phases([(2, 0.0), (2, 0.5), (2, 0.8)]), samples=4, block_size=9, damping=1e-2
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(step: int, *, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A process's part of a batch of 16."""
    generator = torch.Generator().manual_seed(step)
    inputs, labels = torch.randn(16, 13, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    return inputs.chunk(world_size)[rank], labels.chunk(world_size)[rank]


def course(method, *, kind: str = "bare", rank: int = 0, world_size: int = 1) -> list[list[torch.Tensor]]:
    model = network()
    if kind == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def backward_on(step: int) -> torch.Tensor:
        inputs, labels = batch(step, rank=rank, world_size=world_size)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    sparsifier = st.Sparsifier(method, model, optimizer, gradient_pass=lambda index: backward_on(1000 + index))
    seen = []
    for step in range(method.schedule.total_steps):
        sparsifier.backward(lambda step=step: backward_on(step))
        optimizer.step()
        optimizer.zero_grad()
        tensors = [*model.parameters(), *sparsifier.masks.values()]
        seen.append([t.full_tensor().detach() if kind == "fsdp2" else t.detach().clone() for t in tensors])
    return seen


CASES = [("ddp", CRAM), ("fsdp2", CRAM), ("ddp", WOODFISHER)]


def in_a_process(rank: int) -> tuple[list[list[list[list[float]]]], str]:
    """Return the courses of all cases, and how WoodFisher refuses shards; one start of processes serves all."""
    courses = [course(method, kind=kind, rank=rank, world_size=2) for kind, method in CASES]
    try:
        course(WOODFISHER, kind="fsdp2", rank=rank, world_size=2)
    except UsageError as error:
        return [[[t.tolist() for t in tensors] for tensors in seen] for seen in courses], str(error)
    return [], ""


def test_two_processes_do_what_one_does_on_the_whole_batch(tmp_path):
    (first, refusal), second = run(in_a_process, 2, tmp_path)
    assert (first, refusal) == second
    for (_, method), seen in zip(CASES, first, strict=True):
        for found, tensors in zip(seen, course(method), strict=True):
            for values, tensor in zip(found, tensors, strict=True):
                torch.testing.assert_close(torch.tensor(values), tensor, rtol=1e-3, atol=1e-4)
    assert "0.weight is sharded" in refusal
    assert "DistributedDataParallel" in refusal
