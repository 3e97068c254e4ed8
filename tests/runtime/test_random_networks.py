"""Random networks and random choices: whatever runs on planes and whatever does not, results are PyTorch's."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error, slim

from sparsetwin.models import build
from sparsetwin.runtime._choices import Choice
from sparsetwin.runtime._entries import make
from sparsetwin.runtime._graph import Graph, Linear
from sparsetwin.runtime._lowering import can_use_planes
from sparsetwin.runtime._plain import run_plain
from sparsetwin.runtime._products import Packed

ACTIVATIONS = (nn.Identity, nn.ReLU, nn.GELU, nn.SiLU)


class Chain(nn.Module):
    """Layers one after the other; a shortcut wherever shapes allow one and it is asked for."""

    def __init__(self, layers: list[nn.Module], shortcuts: list[bool]) -> None:
        super().__init__()
        self.layers, self.shortcuts = nn.ModuleList(layers), shortcuts

    def forward(self, x: Tensor) -> Tensor:
        for layer, shortcut in zip(self.layers, self.shortcuts, strict=True):
            y = layer(x)
            x = x + y if shortcut and x.shape == y.shape else y
        return x


@st.composite
def chains(draw):
    channels, layers = draw(st.sampled_from([1, 4, 6])), []
    first = channels
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "depthwise", "norm", "pool"]))
        activation = draw(st.sampled_from(ACTIVATIONS))()
        if kind == "norm":
            layers.append(nn.Sequential(nn.BatchNorm2d(channels), activation))
        elif kind == "pool":
            layers.append(nn.Sequential(nn.ReLU(), nn.MaxPool2d(draw(st.sampled_from([2, 3])), 2, 1)))
        else:
            kernel, stride = draw(st.sampled_from([1, 3, (1, 5), 2])), draw(st.sampled_from([1, 1, 2, (2, 1)]))
            padding, dilation = draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([1, 1, 2]))
            groups = channels if kind == "depthwise" else 1
            out = channels if kind == "depthwise" else draw(st.sampled_from([2, 4, 6]))
            convolution = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
            norm = nn.BatchNorm2d(out) if draw(st.booleans()) else nn.Identity()
            layers.append(nn.Sequential(convolution, norm, activation))
            channels = out
    if draw(st.booleans()):
        layers.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)))
    shortcuts = [draw(st.booleans()) for _ in layers]
    shape = (draw(st.sampled_from([1, 3])), first, draw(st.integers(9, 20)), draw(st.integers(9, 20)))
    return Chain(layers, shortcuts), shape, draw(st.sampled_from([0.0, 0.2, 1.0])), draw(st.sampled_from([1, 2]))


def _runs(model: nn.Module, x: Tensor) -> bool:
    try:
        return model(x).numel() > 0
    except RuntimeError:  # the images became smaller than a kernel
        return False


@settings(max_examples=25, deadline=None)
@given(chains())
def test_random_chains_of_layers_equal_pytorch(case):
    model, shape, density, threads = case
    model, x = pruned(model, density), images(*shape)
    if not _runs(model, x):
        return
    graph = graph_of(model, x)
    with torch.no_grad():
        expected = model(x)
    assert relative_error(run_plain(graph, [x])[0], expected) <= FP32
    found = program(graph, threads=threads).program
    first, again = found.run([x])[0], found.run([x])[0]
    assert relative_error(first, expected) <= FP32
    assert torch.equal(first, again)  # what an earlier call left in memory does not matter


@functools.cache
def traced(name: str) -> tuple[Graph, Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "slim":
        model, x = slim(), images(2, 3, 19, 23)
    elif name == "resnet":
        model, x = pruned(build("cifar_resnet", depth=8), 0.2), images(2, 3, 16, 16)
    else:
        model = pruned(build("gpt", vocabulary=11, layers=1, width=32), 0.2)
        x = torch.randint(0, 11, (3, 50), generator=torch.Generator().manual_seed(0))
    graph = graph_of(model, x)
    return graph, x, run_plain(graph, [x])[0]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["slim", "resnet", "gpt"]), st.integers(1, 3), st.data())
def test_every_choice_of_engines_gives_the_same_result(name, threads, data):
    graph, x, expected = traced(name)
    choices = {}
    for node in graph.nodes:
        engines = ["dense"]
        if can_use_planes(graph, node):
            engines.append("planes")
        if isinstance(node.operation, Linear):
            engines.append("rows")
        choices[node.output] = Choice(engine=data.draw(st.sampled_from(engines)))
    made = make(graph, choices, packed=Packed(), threads=threads)
    for _ in range(2):
        assert relative_error(made.program.run([x])[0], expected) <= FP32
