import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparsetwin as st
from sparsetwin.integrations._backward import MaskedBackward

SCHEDULE = st.schedules.phases([(1, 0.0), (2, 0.8), (1, 0.0)])


def make() -> tuple[nn.Sequential, torch.optim.Optimizer, st.Sparsifier, MaskedBackward]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(st.ACDC(schedule=SCHEDULE), model, optimizer)
    return model, optimizer, sparsifier, MaskedBackward(sparsifier)


def alive(sparsifier: st.Sparsifier) -> int:
    """Count the gradients of pruned weights that are not zero."""
    gradients = {name: weight.grad for name, weight in sparsifier.weights.items()}
    return sum(int(gradients[name][~mask].count_nonzero()) for name, mask in sparsifier.masks.items())


def test_gradients_are_masked_during_backward_and_only_in_sparse_phases():
    model, optimizer, sparsifier, backward = make()
    for is_sparse in (False, True, True, False):
        sparsifier.begin_step()
        for _ in range(2):  # accumulated
            model(torch.randn(8, 20)).square().sum().backward()
            assert alive(sparsifier) == 0
        hooked = [bool(weight._post_accumulate_grad_hooks) for weight in sparsifier.weights.values()]
        assert hooked == [is_sparse] * 2
        assert (float(model[0].weight.grad.eq(0).float().mean()) > 0.5) == is_sparse
        optimizer.step()
        optimizer.zero_grad()
    backward.remove()


def test_nan_in_the_gradient_of_a_pruned_weight_is_masked_too():
    model, optimizer, sparsifier, _ = make()
    model(torch.randn(8, 20)).sum().backward()
    sparsifier.begin_step()
    optimizer.step()
    sparsifier.begin_step()
    model[0].weight.grad = torch.where(sparsifier.masks["0.weight"], 0.0, torch.nan)
    model(torch.randn(8, 20)).sum().backward()
    assert model[0].weight.grad.isfinite().all()


def test_gradients_that_a_method_grows_weights_by_are_left_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = st.schedules.periodic(sparsity=0.8, total_steps=6, every_steps=2)
    sparsifier = st.Sparsifier(st.RigL(schedule=schedule), model, optimizer)
    MaskedBackward(sparsifier)
    for step in range(6):
        sparsifier.begin_step()
        assert sparsifier.awaits_gradients == (step in (2, 4))
        model(torch.randn(8, 20)).square().sum().backward()
        assert (alive(sparsifier) > 0) == (step in (2, 4))
        optimizer.step()
        assert not sparsifier.awaits_gradients
        optimizer.zero_grad()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    return number


def _train_on_a_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for as_view in (False, True):
        model, optimizer, sparsifier, _ = make()
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
        torch.manual_seed(rank)
        for _ in range(SCHEDULE.total_steps):
            sparsifier.begin_step()
            wrapped(torch.randn(8, 20)).square().sum().backward()
            assert alive(sparsifier) == 0
            others = model[0].weight.grad.clone()
            dist.all_reduce(others, op=dist.ReduceOp.MAX)
            assert torch.equal(others, model[0].weight.grad)  # the average, on every rank
            optimizer.step()
            optimizer.zero_grad(set_to_none=not as_view)
    dist.destroy_process_group()


def test_ddp_averages_masked_gradients(port: int):
    torch.multiprocessing.spawn(_train_on_a_rank, args=(port,), nprocs=2)
