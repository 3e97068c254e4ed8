"""The mirror step takes the gradient that the optimizer was given, whatever the optimizer makes of it."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from torch import nn

import sparsetwin as st

DENSE = st.schedules.constant(sparsity=0.0, total_steps=6)
CHOICES = {
    "foreach": [False, True],
    "fused": [False, True],
    "momentum": [0.9],
    "nesterov": [False, True],
    "maximize": [False, True],
    "weight_decay": [0.0, 0.1],
}
REFUSED = (
    torch.optim.LBFGS,
    torch.optim.SparseAdam,
    torch.optim.Optimizer,
)  # by Sparsifier; sparse gradients; abstract
BUILT_IN = [kind for name in sorted(torch.optim.__all__) if isinstance(kind := getattr(torch.optim, name), type)]


def settings_of(kind: type[torch.optim.Optimizer]) -> list[dict]:
    """Return all combinations of the choices that an optimizer has."""
    known = inspect.signature(kind).parameters
    choices = {name: values for name, values in CHOICES.items() if name in known}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [each for each in combinations if not (each.get("foreach") and each.get("fused"))]


def follow(make) -> None:
    """Compare three steps of dense training with HAM to the optimizer's own steps, each with a mirror step after it."""
    ham = st.HAM(alpha=3.0, beta=0.1)
    weights = [nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
    model, plain = nn.ParameterList(weights), copy.deepcopy(nn.ParameterList(weights))
    optimizer, plain_optimizer = make(model.parameters()), make(plain.parameters())
    targets = st.Targets(include=["*"])
    sparsifier = st.Sparsifier(st.Dense(schedule=DENSE, ham=ham), model, optimizer, targets=targets)
    for step in range(3):
        sparsifier.begin_step()
        given = [torch.randn(3, 3, generator=torch.Generator().manual_seed(9 + 2 * step + i)) for i in (0, 1)]
        for parameters in (model, plain):
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient.clone()
        optimizer.step()
        plain_optimizer.step()
        group = plain_optimizer.param_groups[0]
        with torch.no_grad():
            for parameter, gradient in zip(plain, given, strict=True):
                sign = -1 if group.get("maximize") else 1
                exponent = group["lr"] * (-3.0 * parameter.sign() * sign * gradient - 0.1)
                parameter.mul_(exponent.clamp(-5.0, 5.0).exp())
        torch.testing.assert_close(list(model), list(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in BUILT_IN if kind not in REFUSED], ids=lambda kind: kind.__name__)
def test_with_each_optimizer_and_its_settings_the_gradient_is_the_one_that_was_given(kind):
    followed = 0
    for settings in settings_of(kind):
        try:
            kind([nn.Parameter(torch.ones(2, 2))], **settings)
        except (ValueError, RuntimeError):  # an optimizer's own rules, such as no fused one that is differentiable
            continue
        follow(lambda parameters, settings=settings: kind(parameters, lr=0.1, **settings))
        followed += 1
    assert followed >= 2


class Overwriting(torch.optim.SGD):
    """Leaves nothing of the gradients."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.fill_(math.nan)


class Centering(torch.optim.Optimizer):
    """Takes the mean out of each gradient before it uses it."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.sub_(parameter.grad.mean())
                parameter.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("make", [lambda parameters: Overwriting(parameters, lr=0.1), Centering])
def test_an_optimizer_may_overwrite_gradients(make):
    follow(make)
