"""A small real network, and what a sparse training run would show of it."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from sparsetwin.masking import Masks, apply_masks_
from sparsetwin.schedules import Phase


class Network(nn.Module):
    """A convolution, a batch norm, a linear layer, and a head tied to an embedding."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.embedding = nn.Embedding(6, 5)
        self.head = nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.linear = nn.Linear(4, 5, dtype=torch.float64)

    def forward(self, x):
        features = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.linear(features.double()).float())


@dataclass(frozen=True)
class View:
    """A SparseView of plain values."""

    steps: int
    masks: Masks = field(default_factory=dict)
    phase: Phase | None = None
    target_names: tuple[str, ...] = ("conv.weight", "linear.weight")


@pytest.fixture
def network():
    """A network whose weights and batch-norm statistics are not the initial ones."""
    torch.manual_seed(0)
    network = Network()
    network(torch.randn(8, 2, 5, 5))
    return network


@pytest.fixture
def dense_view():
    return View(10)


@pytest.fixture
def sparse_view():
    generator = torch.Generator().manual_seed(1)
    shapes = {"conv.weight": (4, 2, 3, 3), "linear.weight": (5, 4)}
    return View(20, {name: torch.rand(shape, generator=generator) < 0.25 for name, shape in shapes.items()})


@pytest.fixture
def pruned(network, sparse_view):
    """Another state of the network, with the masks of ``sparse_view`` applied."""
    pruned = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1)
    apply_masks_(dict(pruned.named_parameters()), sparse_view.masks)
    return pruned


def assert_same_bits(found, expected):
    """Compare two name -> tensor mappings bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes), name


@pytest.fixture(scope="session")
def same_bits():
    return assert_same_bits


class Stopped(Exception):
    """Stands for a crash."""


class Stopper:
    """Lets calls of file operations through until one is to fail, or to be the last that is done."""

    stopped = Stopped

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls = 0
        self.stop_at: int | None = None
        self.error: object = None
        self.done_first = False

    def watch(self, module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            if self.stop_at is not None and self.calls >= self.stop_at:  # the process is gone: nothing happens any more
                if self.calls == self.stop_at and self.done_first:
                    result = original(*args, **kwargs)
                    if name == "open":
                        result.close()
                self.calls += 1
                raise self.error
            self.calls += 1
            return original(*args, **kwargs)

        self.monkeypatch.setattr(module, name, call)

    def stop(self, at, error=Stopped, *, done_first=False):
        self.calls, self.stop_at, self.error, self.done_first = 0, at, error, done_first

    def release(self):
        """Let all through again, and return the number of calls since the stop was set, failed ones included."""
        calls, self.calls, self.stop_at = self.calls, 0, None
        return calls


@pytest.fixture
def stopper(monkeypatch):
    """Stops at the n-th of all file operations that change the disk, as a killed process would."""
    import os
    from pathlib import Path

    stopper = Stopper(monkeypatch)
    for module, name in [(os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "open"), (Path, "mkdir")]:
        stopper.watch(module, name)
    return stopper
