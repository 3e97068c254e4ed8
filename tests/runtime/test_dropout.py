"""Dropout is removed where the model leaves it out, and is random where the model asks for it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import graph_of, images, program

from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._graph import Torch

DROPOUTS = {
    "dropout": lambda y, on: F.dropout(y, 0.5, on),
    "in place": lambda y, on: F.dropout(F.relu(y + 9.0), 0.5, on, inplace=True),
    "channels": lambda y, on: F.dropout1d(y, 0.5, on),
    "alpha": lambda y, on: F.alpha_dropout(y, 0.5, on),
    "alpha, channels": lambda y, on: F.feature_alpha_dropout(y, 0.5, on),
    "of a constant": lambda y, on: y * F.dropout(torch.ones(16), 0.5, on),
    "before an activation in place": lambda y, on: F.relu_(F.dropout(y + 9.0, 0.5, on)),
}


class Dropped(nn.Module):
    def __init__(self, name: str, *, on: bool) -> None:
        super().__init__()
        self.inner, self.name, self.on = nn.Linear(16, 16), name, on

    def forward(self, x: Tensor) -> Tensor:
        return DROPOUTS[self.name](self.inner(x), self.on)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_that_is_on_is_random_in_each_call(name, planes):
    torch.manual_seed(0)
    model, x = Dropped(name, on=True).eval(), images(4, 16)
    made = program(graph_of(model, x), planes=planes).program
    found = [made.run([x])[0].clone() for _ in range(4)]
    assert not all(torch.equal(found[0], other) for other in found[1:])


def test_dropout_that_is_on_scales_and_zeroes_as_pytorch_does():
    torch.manual_seed(0)
    model, x = Dropped("dropout", on=True).eval().requires_grad_(False), images(64, 16)
    (y,) = program(graph_of(model, x)).program.run([x])
    kept = y != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(y[kept], 2 * model.inner(x)[kept])


@pytest.mark.parametrize("name", ["dropout", "in place", "channels"])
def test_dropout_that_is_off_is_no_operation(name):
    model, x = Dropped(name, on=False).eval(), images(4, 16)
    names = [str(node.operation.function) for node in graph_of(model, x).nodes if isinstance(node.operation, Torch)]
    assert not any("dropout" in found for found in names)


def test_dropout_stays_random_in_a_file(tmp_path):
    torch.manual_seed(0)
    x = images(4, 16)
    deploy(Dropped("dropout", on=True).eval(), x, rivals=()).save(tmp_path / "f")
    again = load(tmp_path / "f")
    assert not all(torch.equal(again(x), again(x)) for _ in range(3))
