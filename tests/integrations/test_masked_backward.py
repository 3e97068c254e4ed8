import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparsetwin as st
from sparsetwin.integrations._backward import MaskedBackward
from sparsetwin.methods import Method

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


CHANGING = st.schedules.phases([(2, 0.0), (4, 0.6), (2, 0.0), (4, 0.8)])
STEADY = st.schedules.periodic(sparsity=0.8, total_steps=12, every_steps=3)
METHODS = {
    "acdc": lambda: st.ACDC(schedule=CHANGING),
    "rigl": lambda: st.RigL(schedule=STEADY),
    "set": lambda: st.SET(schedule=STEADY),
    "snip": lambda: st.SNIP(schedule=STEADY),
    "topkast": lambda: st.TopKAST(schedule=CHANGING, backward_sparsity=0.3),
    "topkast, which chooses seldom": lambda: st.TopKAST(schedule=CHANGING, every_steps=3),
    "st3": lambda: st.ST3(schedule=CHANGING),
    "str": lambda: st.STR(schedule=CHANGING, initial=-4.0),
}


def train(method: Method, *, masks_in_backward: bool) -> nn.Sequential:
    """Train 12 steps of two batches each, clipped; masked during backward, or by the line that a plain loop has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = st.Sparsifier(method, model, optimizer)
    if masks_in_backward:
        MaskedBackward(sparsifier)
    for _ in range(12):
        sparsifier.begin_step()
        for _ in range(2):
            model(torch.randn(8, 20)).square().sum().backward()
        if not masks_in_backward:
            sparsifier.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_in_a_plain_loop_that_masks_before_it_clips(name: str):
    plain = train(METHODS[name](), masks_in_backward=False)
    masked = train(METHODS[name](), masks_in_backward=True)
    for expected, found in zip(plain.parameters(), masked.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_weights_that_a_method_updates_without_computing_with_them_keep_their_gradients():
    torch.manual_seed(0)
    model = nn.Linear(20, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = st.schedules.constant(sparsity=0.8, total_steps=4)
    sparsifier = st.Sparsifier(st.TopKAST(schedule=schedule, exploration=0), model, optimizer)
    MaskedBackward(sparsifier)
    for _ in range(4):
        sparsifier.begin_step()
        model(torch.randn(8, 20)).square().sum().backward()
        gradient, updated = model.weight.grad, sparsifier.gradient_masks["weight"]
        assert int((updated & ~sparsifier.masks["weight"]).sum()) == 180  # B outside A: 300 of 600 less 120
        assert torch.equal(gradient != 0, updated)
        optimizer.step()
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
