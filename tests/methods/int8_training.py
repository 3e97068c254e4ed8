"""Runs of quantization-aware training, and rounding that shares no code with the library's."""

import math

import numpy as np
import torch
from small_network import loss_of, network

import sparsetwin as st
from sparsetwin.methods import STORED

SCHEDULE = st.schedules.phases([(2, 0.0), (3, 0.8), (2, 0.0), (5, 0.8)])
FIRST = 9  # in the middle of the last phase
TOTAL = 12
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


def acdc(first: int | None = FIRST) -> st.ACDC:
    return st.ACDC(schedule=SCHEDULE, reset="none", quantization=st.Int8(start_step=first))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round one weight after the other with Python's own functions; only a scale is float32."""
    rows = weight.detach().reshape(len(weight), -1).tolist()
    found = []
    for row in rows:
        scale = np.float32(max(map(abs, row)) / 127)
        steps = [max(-127, min(127, round(w / float(scale)))) if scale else 0 for w in row]
        found += [float(np.float32(q) * scale) for q in steps]
    return torch.tensor(found).view_as(weight)


def is_on_grid(weight: torch.Tensor) -> bool:
    return torch.equal(rounded(weight), weight.detach())


class Straight(torch.autograd.Function):
    """Round forward, and backward do nothing."""

    @staticmethod
    def forward(ctx, weight):
        return rounded(weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Training:
    """A model with a sparsifier, step by step."""

    def __init__(self, method=None, optimizer="sgd", *, model=None, scaler=None):
        self.model = network() if model is None else model
        made = OPTIMIZERS[optimizer](self.model.parameters()) if isinstance(optimizer, str) else optimizer(self.model)
        self.optimizers = made if isinstance(made, list) else [made]
        self.sparsifier = st.Sparsifier(method or acdc(), self.model, self.optimizers)
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def attempt(self, *, overflows=False):
        self.sparsifier.begin_step()
        self.scaler.scale(loss_of(self.model, self.sparsifier.steps)).backward()
        if overflows:
            self.model[6].weight.grad.fill_(math.inf)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad()
        return self

    def train(self, steps):
        for _ in range(steps):
            self.attempt()
        return self

    @property
    def stored(self):
        buffers = self.sparsifier.state_dict()["buffers"]
        return {name: weight.clone() for name, weight in buffers.get(STORED, {}).items()}

    @property
    def weights(self):
        return {name: weight.detach().clone() for name, weight in self.sparsifier.weights.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
