"""The hyperbolic mirror step, by hand and against loops that share no code with it."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.errors import ConfigError
from sparsetwin.methods import STORED, Method

SCHEDULE = st.schedules.phases([(2, 0.0), (3, 0.8), (2, 0.0), (3, 0.8)])
DENSE = st.schedules.constant(sparsity=0.0, total_steps=6)
PRUNED = ("0.weight", "4.weight", "6.weight")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.01, foreach=True),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(6, 1, 6, 6, generator=generator)
    return nn.functional.cross_entropy(model(inputs), torch.randint(4, (6,), generator=generator))


def mirrored(weight: torch.Tensor, gradient: torch.Tensor, lr: float, *, alpha: float = 200.0, beta: float = 1e-3):
    """Move one weight after the other, with Python's own functions in double precision."""
    moved = []
    for w, g in zip(weight.flatten().tolist(), gradient.flatten().tolist(), strict=True):
        if w:
            exponent = lr * (-alpha * math.copysign(1.0, w) * g - beta)
            w *= math.exp(max(-5.0, min(5.0, exponent)))
        moved.append(w)
    return torch.tensor(moved, dtype=weight.dtype).view_as(weight)


class Given(nn.Module):
    """A matrix and a vector whose gradients are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[2.0, -1.0, 0.5, 0.0]]))
            self.layer.bias.fill_(1.0)

    def loss(self, gradient: list[float]) -> torch.Tensor:
        return (self.layer.weight * torch.tensor([gradient])).sum() + 3 * self.layer.bias.sum()


def one_step(gradient: list[float], *, ham: st.HAM, maximize: bool = False) -> nn.Linear:
    model = Given()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize)
    sparsifier = st.Sparsifier(st.Dense(schedule=DENSE, ham=ham), model, optimizer)
    sparsifier.begin_step()
    (-model.loss(gradient) if maximize else model.loss(gradient)).backward()
    optimizer.step()
    return model.layer


@pytest.mark.parametrize("maximize", [False, True])
def test_a_step_by_hand(maximize):
    layer = one_step([1.0, 1.0, -2.0, 0.0], ham=st.HAM(alpha=2.0, beta=0.5), maximize=maximize)
    # sgd: 1.9, -1.1, 0.7, 0; exponents 0.1 * (-2 - 0.5), 0.1 * (2 - 0.5), 0.1 * (4 - 0.5)
    expected = torch.tensor([[1.9 * math.exp(-0.25), -1.1 * math.exp(0.15), 0.7 * math.exp(0.35), 0.0]])
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[1.479721, -1.278018, 0.993347, 0.0]]))
    torch.testing.assert_close(layer.bias.detach(), torch.tensor([0.7]))  # one axis: the optimizer's step alone


def test_the_sign_is_that_of_the_weight_after_the_update():
    layer = one_step([0.0, -20.0, 20.0, 1.0], ham=st.HAM(alpha=0.5, beta=0.0))
    # sgd: 2, 1, -1.5, -0.1; every updated weight has turned over, so that each grows along its update
    expected = torch.tensor([[2.0, 1.0 * math.exp(1.0), -1.5 * math.exp(1.0), -0.1 * math.exp(0.05)]])
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_the_exponent_is_held_within_five_of_zero():
    layer = one_step([1.0, 1.0, 0.0, 0.0], ham=st.HAM(alpha=1e6, beta=0.0))
    expected = torch.tensor([[1.9 * math.exp(-5.0), -1.1 * math.exp(5.0), 0.5, 0.0]])
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_without_strength_it_changes_nothing():
    layer = one_step([1.0, 1.0, -2.0, 3.0], ham=st.HAM(alpha=0.0, beta=0.0))
    assert torch.equal(layer.weight.detach(), torch.tensor([[2.0, -1.0, 0.5, 0.0]]) - 0.1 * torch.tensor([1, 1, -2, 3]))


@pytest.mark.parametrize("fields", [{"alpha": -1.0}, {"beta": -1e-3}, {"alpha": math.inf}, {"beta": math.nan}])
def test_numbers_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError, match="finite number that is not negative"):
        st.HAM(**fields)


# Against plain loops


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_acdc_with_it_follows_the_plain_loop(optimizer):
    """Optimizer's step, mirror step, mask: written out with masks by sorting; a scheduler changes the learning rate."""
    model, plain = network(), network()
    sparse_optimizer, plain_optimizer = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, plain))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (sparse_optimizer, plain_optimizer)]
    sparsifier = st.Sparsifier(st.ACDC(schedule=SCHEDULE, reset="none", ham=st.HAM()), model, sparse_optimizer)
    parameters, masks = dict(plain.named_parameters()), {}
    for step in range(10):
        sparsifier.begin_step()
        loss_of(model, step).backward()
        if step in (2, 7):
            largest = torch.cat([parameters[name].detach().abs().flatten() for name in PRUNED]).sort().values[-89]
            masks = {name: parameters[name].detach().abs() >= largest for name in PRUNED}
        masks = {} if step == 5 else masks
        for name, mask in masks.items():
            parameters[name].detach()[~mask] = 0.0
        loss_of(plain, step).backward()
        for name, mask in masks.items():
            parameters[name].grad[~mask] = 0.0
        lr = plain_optimizer.param_groups[0]["lr"]
        gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        for o, scheduler in zip((sparse_optimizer, plain_optimizer), schedulers, strict=True):
            o.step()
            scheduler.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.ndim > 1:
                    parameter.copy_(mirrored(parameter, gradients[name], lr))
                    parameter.copy_(torch.where(masks[name], parameter, 0) if masks else parameter)
        assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier.masks.items())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, parameters[name], rtol=2e-5, atol=1e-6)
            parameter.data.copy_(parameters[name])  # so that rounding does not grow
        sparse_optimizer.zero_grad()
        plain_optimizer.zero_grad()


def test_with_rigl_a_step_that_grows_weights_has_no_mirror_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = st.schedules.periodic(sparsity=0.8, total_steps=9, every_steps=3)
    sparsifier = st.Sparsifier(st.RigL(schedule=schedule, ham=st.HAM()), model, optimizer)
    for step in range(9):
        sparsifier.begin_step()
        loss_of(model, step).backward()
        before = {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}
        gradients = {name: weight.grad.clone() for name, weight in sparsifier.weights.items()}
        optimizer.step()
        for name, weight in sparsifier.weights.items():
            mask = sparsifier.masks[name]
            if step in (3, 6):
                expected = torch.where(mask, before[name], 0)
            else:
                gradient = torch.where(mask, gradients[name], 0)
                expected = mirrored(torch.where(mask, before[name] - 0.1 * gradient, 0), gradient, 0.1)
            torch.testing.assert_close(weight.detach(), expected, rtol=2e-5, atol=1e-6)
        optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Halved(Method):
    """Let the parameters hold half of the stored weights in sparse phases, and learn a matrix beside them."""

    stores_weights = True

    def enter(self, phase, state):
        return {n: torch.ones_like(w, dtype=torch.bool) for n, w in state.weights.items()} if phase.is_sparse else {}

    def project(self, name, state):
        return state.weights[name] / 2

    def learned(self, state):
        return {name: torch.ones(2, 2) for name in state.weights}

    def before_update(self, state):
        for parameter in state.learned.values():
            parameter.grad = torch.ones_like(parameter)


def test_where_weights_are_stored_it_moves_the_stored_ones_by_the_gradient_at_the_effective_ones():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = st.Sparsifier(
        Halved(schedule=st.schedules.constant(sparsity=0.5, total_steps=4), ham=st.HAM()), model, optimizer
    )
    stored = {name: weight.detach().clone() for name, weight in sparsifier.weights.items()}
    for step in range(4):
        sparsifier.begin_step()
        loss_of(model, step).backward()
        for name, weight in sparsifier.weights.items():
            assert torch.equal(weight.detach(), stored[name] / 2)
            stored[name] = mirrored(stored[name] - 0.1 * weight.grad, weight.grad, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        state = sparsifier.state_dict()
        for name, tensor in state["buffers"][STORED].items():
            torch.testing.assert_close(tensor, stored[name], rtol=2e-5, atol=1e-6)
            stored[name] = tensor.clone()
    for parameter in state["learned"].values():  # has two axes, but is no weight: sgd's steps alone
        torch.testing.assert_close(parameter, torch.full((2, 2), 1 - 4 * 0.1))


# What surrounds it


def weights_after(optimizer, *, steps: int = 10, scaler=None, clips=False, lr=None, overflowing=(), seed=0):
    """Train AC/DC with HAM; return the parameters."""
    model = network(seed)
    optimizer = optimizer(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    sparsifier = st.Sparsifier(st.ACDC(schedule=SCHEDULE, ham=st.HAM()), model, optimizer)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    attempt = 0
    while sparsifier.steps < steps:
        sparsifier.begin_step()
        scaler.scale(loss_of(model, sparsifier.steps)).backward()
        if attempt in overflowing:
            model[4].weight.grad[0, 0] = math.inf
        if clips:
            scaler.unscale_(optimizer)
            sparsifier.mask_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        attempt += 1
    return [parameter.detach() for parameter in model.parameters()]


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_are_those_without_the_scale_of_a_scaler(optimizer, clips):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    plain = weights_after(OPTIMIZERS[optimizer], clips=clips)
    assert_equal(weights_after(OPTIMIZERS[optimizer], scaler=scaler, clips=clips), plain)  # the scale is a power of two


@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused"])
def test_a_step_that_a_scaler_skips_has_no_mirror_step(optimizer):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)

    found = weights_after(OPTIMIZERS[optimizer], scaler=scaler(), overflowing={1, 4, 5})
    expected = weights_after(OPTIMIZERS[optimizer], scaler=scaler())
    for index in (0, 4, 6):  # batch norm counts forward passes, but what moves the weights is the same
        assert torch.equal(found[index], expected[index])


def test_a_learning_rate_in_a_tensor_is_used():
    for make in (OPTIMIZERS["sgd"], OPTIMIZERS["adamw"]):
        expected = weights_after(make, lr=0.0625, steps=3)
        found = weights_after(make, lr=torch.tensor(0.0625), steps=3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # torch's own step rounds otherwise then
        assert not torch.equal(weights_after(make, lr=0.125, steps=3)[0], expected[0])


class Outer(torch.optim.SGD):
    """A class whose step calls its base class's, so that hooks fire twice."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("make", [torch.optim.SGD, Outer])
@pytest.mark.parametrize("clears_early", [False, True])
def test_several_optimizers_do_what_one_does(make, clears_early):
    model = network()
    optimizers = [make(model[:5].parameters(), lr=0.1), make(model[5:].parameters(), lr=0.1)]
    sparsifier = st.Sparsifier(st.ACDC(schedule=SCHEDULE, ham=st.HAM()), model, optimizers)
    for step in range(10):
        sparsifier.begin_step()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            if clears_early:
                optimizer.zero_grad()
        model.zero_grad()
    expected = weights_after(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert_equal([parameter.detach() for parameter in model.parameters()], expected)


def test_of_several_optimizers_one_that_a_scaler_skips_leaves_its_weights_alone():
    model = network()
    optimizers = [torch.optim.SGD(model[:5].parameters(), lr=0.1), torch.optim.SGD(model[5:].parameters(), lr=0.1)]
    sparsifier = st.Sparsifier(st.Dense(schedule=DENSE, ham=st.HAM()), model, optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sparsifier.begin_step()
    scaler.scale(loss_of(model, 0)).backward()
    model[4].weight.grad[0, 0] = math.inf
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for optimizer in optimizers:
        scaler.step(optimizer)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False] * 6 + [True] * 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_gradient_of_an_embedding_may_be_sparse():
    moved = []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(5, 3, sparse=is_sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        targets = st.Targets(include=["weight"])
        sparsifier = st.Sparsifier(st.Dense(schedule=DENSE, ham=st.HAM()), model, optimizer, targets=targets)
        sparsifier.begin_step()
        model(torch.tensor([1, 3])).square().sum().backward()
        optimizer.step()
        moved.append(model.weight.detach())
    assert torch.equal(*moved)
