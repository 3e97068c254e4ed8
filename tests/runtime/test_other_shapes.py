"""Calls of other shapes and ranks than the example's: every program that is made for them equals the model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, Slim, graph_of, images, pruned, relative_error, slim

from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._choices import Choice, Choices, Engine
from sparsetwin.runtime._entries import make_programs
from sparsetwin.runtime._graph import Graph, Linear
from sparsetwin.runtime._lowering import can_use_planes, lower


def feed_forward() -> nn.Module:
    torch.manual_seed(0)
    return pruned(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)), 0.2)


def as_measured(graph: Graph, linears: Engine = "planes") -> Choices:
    """Choices of a graph in which planes were the fastest wherever they can be used, or another engine for linears."""

    def choice(fits: bool) -> Choice:
        seconds = {"planes": 1e-6, "dense": 1e-3} if fits else {"dense": 1e-3}
        return Choice(engine="planes" if fits else "dense", seconds=seconds)

    found = {node.output: choice(can_use_planes(graph, node)) for node in graph.nodes}
    layers = {node.output for node in graph.nodes if isinstance(node.operation, Linear)}
    return {output: replace(one, engine=linears) if output in layers else one for output, one in found.items()}


def check(model: nn.Module, first: torch.Tensor, x: torch.Tensor, linears: Engine = "planes") -> None:
    """Every program for ``x``, with what was measured for another shape, equals the model."""
    with torch.no_grad():
        expected = model(x)
    measured = as_measured(graph_of(model, first), linears)
    for name, made in make_programs(graph_of(model, x), measured, threads=1).items():
        (found,) = made.program.run([x])
        assert found.shape == expected.shape, name
        assert x.numel() == 0 or relative_error(found, expected) <= FP32, name


@pytest.mark.parametrize("linears", ["planes", "rows"])
@pytest.mark.parametrize(
    "shape",
    [(1, 32, 4, 32), (1, 32, 16, 32), (2, 32, 1, 32), (2, 3, 16, 32), (2, 3, 1, 5, 32), (32,), (0, 32), (7, 32)],
)
def test_linears_measured_on_tokens_are_right_for_values_of_any_rank(shape, linears):
    check(feed_forward(), images(1, 9, 32), images(*shape), linears)


def test_a_call_whose_values_fit_no_planes_runs_in_pytorch():
    model = feed_forward()
    programs = make_programs(
        graph_of(model, images(2, 3, 4, 32)), as_measured(graph_of(model, images(5, 32))), threads=1
    )
    assert list(programs) == ["dense graph"]


def test_linears_of_images_cannot_be_lowered_to_planes():
    graph = graph_of(feed_forward(), images(1, 32, 4, 32))
    with pytest.raises(AssertionError, match="takes tokens"):
        lower(graph, {node.output: "planes" for node in graph.nodes})


def test_an_empty_batch_of_images_gives_an_empty_result():
    check(slim(), images(1, 3, 32, 32), images(0, 3, 32, 32))


class Cast(nn.Module):
    """Computes in float64 what comes in float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + nn.functional.gelu(x)


def test_a_value_of_another_dtype_runs_in_pytorch():
    check(Cast(), images(4, 32), images(4, 32).double())


def test_deployed_networks_take_other_ranks_and_empty_batches(tmp_path):
    model = feed_forward()
    deployed = deploy(model, images(1, 9, 32), rivals=())
    for shape in ((1, 32, 4, 32), (2, 3, 16, 32), (32,), (0, 9, 32)):
        x = images(*shape)
        with torch.no_grad():
            expected = model(x)
        assert deployed(x).shape == expected.shape
        assert x.numel() == 0 or relative_error(deployed(x), expected) <= FP32
    network = deploy(slim(), images(1, 3, 32, 32), rivals=())
    network.save(tmp_path / "slim.safetensors")
    for found in (network, load(tmp_path / "slim.safetensors")):
        assert found(images(0, 3, 32, 32)).shape == (0, 5)
    assert isinstance(network._source.value.model, Slim)
