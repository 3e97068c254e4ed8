"""Models that change their activations in place: traced without doing so, saved and loaded."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error

from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._graph import Torch


class Positions(nn.Module):
    """Adds a tensor that is broadcast, in place."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("pos", torch.linspace(0, 1, 5 * 16, dtype=self.dtype).reshape(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        h += self.pos
        return self.g(h)


class DoublePositions(Positions):
    """Adds float64 numbers to float32 ones, which stay so."""

    dtype = torch.float64


class DoubleRelu(nn.Linear):
    """An activation in place of what no kernel is for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(super().forward(x).double() * 2)


@pytest.mark.parametrize("kind", [Positions, DoublePositions, lambda: DoubleRelu(16, 4)])
def test_models_that_work_in_place_are_saved_and_loaded(tmp_path, kind):
    torch.manual_seed(0)
    model, x = pruned(kind(), 0.3), images(2, 5, 16)
    graph = graph_of(model, x)
    functions = [node.operation.function for node in graph.nodes if isinstance(node.operation, Torch)]
    assert functions
    assert not any(function._schema.is_mutable for function in functions)
    with torch.no_grad():
        expected = model(x)
    assert relative_error(program(graph).program.run([x])[0], expected) <= FP32
    deploy(model, x, rivals=()).save(tmp_path / "network.safetensors")
    assert relative_error(load(tmp_path / "network.safetensors")(x), expected) <= FP32
