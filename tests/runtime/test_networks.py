"""Whole networks on sparse kernels equal themselves in PyTorch: sizes, batches, sparsities, threads."""

import pytest
import torch
from torch import nn

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, graph_of, images, program, pruned, relative_error
from torch.nn import functional as F

from sparsetwin.models import build
from sparsetwin.models.wide_resnets import WideResNet
from sparsetwin.runtime._graph import MaxPool, Torch
from sparsetwin.runtime._plain import run_plain


def double(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model.double()(x.double()).float()
    model.float()
    return y


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.98, 1.0])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet20", (3, 3, 32, 32)),
        ("resnet20", (1, 3, 27, 33)),
        ("mobilenetv1", (1, 3, 64, 64)),
        ("digits_cnn", (5, 1, 8, 8)),
    ],
)
def test_networks_equal_themselves_in_float64(name, shape, sparsity):
    torch.manual_seed(0)
    model, x = pruned(build(name), 1 - sparsity), images(*shape)
    made = program(graph_of(model, x))
    (y,) = made.program.run([x])
    assert relative_error(y, double(model, x)) <= FP32


@pytest.mark.parametrize(("shape", "threads"), [((1, 3, 64, 64), 2), ((3, 3, 65, 47), 2)])
def test_resnet50_equals_itself_and_threads_change_no_bit(shape, threads):
    torch.manual_seed(0)
    model, x = pruned(build("resnet50"), 0.1), images(*shape)
    graph = graph_of(model, x)
    assert sum(isinstance(node.operation, Torch) for node in graph.nodes) == 1  # flatten; all else is ours
    one = program(graph).program.run([x])[0]
    assert relative_error(one, double(model, x)) <= FP32
    assert torch.equal(program(graph, threads=threads).program.run([x])[0], one)


def test_wide_resnets_with_batch_norms_before_their_convolutions_equal_themselves():
    torch.manual_seed(0)
    model, x = pruned(WideResNet(1, (16, 32, 64), num_classes=10, dropout=0.3), 0.1), images(2, 3, 32, 32)
    (y,) = program(graph_of(model, x)).program.run([x])
    assert relative_error(y, double(model, x)) <= FP32


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 100)])
def test_gpt_with_tokens_as_columns_equals_itself(shape):
    torch.manual_seed(0)
    model = pruned(build("gpt", vocabulary=65, layers=2, width=64), 0.2)
    tokens = torch.randint(0, 65, shape, generator=torch.Generator().manual_seed(1))
    graph = graph_of(model, tokens)
    (y,) = program(graph).program.run([tokens])
    with torch.no_grad():
        expected = model.double()(tokens).float()
    assert relative_error(y, expected) <= FP32


def test_layers_that_are_zero_everywhere_give_their_bias():
    model = pruned(build("resnet20"), 0.3)
    for layer in (model.conv1, model.layer2[0].conv1, model.layer3[1].conv2):
        layer.weight.data.zero_()
    x = images(1, 3, 32, 32)
    assert relative_error(program(graph_of(model, x)).program.run([x])[0], double(model, x)) <= FP32


class Unusual(nn.Module):
    """What is left to PyTorch, amid layers that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding=1)
        self.transposed = nn.ConvTranspose2d(8, 8, 2, 2)
        self.two = nn.Conv2d(16, 8, 3, padding="same")
        self.far = nn.Conv2d(8, 8, 3, stride=3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(2, 8)
        self.line = nn.Conv1d(8, 6, 3)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, object]:
        hidden = F.hardswish(self.one(x) + shift)
        up = self.transposed(hidden)
        both = torch.cat([F.interpolate(hidden, scale_factor=2.0), up], 1)
        hidden = self.norm(F.max_pool2d(self.far(self.two(both)), 2))
        return {"line": self.line(hidden.flatten(2)), "rest": (hidden, [up.sum(), None, 3])}


def test_what_no_kernel_is_for_runs_in_pytorch_and_results_keep_their_structure():
    from sparsetwin.runtime import deploy

    torch.manual_seed(0)
    model = pruned(Unusual(), 0.4)
    x, shift = images(2, 4, 15, 12), images(1, 8, 1, 1)
    deployed = deploy(model, (x, shift), rivals=())
    graph = graph_of(model, x, shift)
    leaves = program(graph).program.run([x, shift])
    for found, expected in zip(leaves, run_plain(graph, [x, shift]), strict=True):
        if isinstance(expected, torch.Tensor):
            assert relative_error(found, expected) <= FP32
    found, expected = deployed(x, shift=shift), model(x, shift)
    assert relative_error(found["line"], expected["line"].detach()) <= FP32
    assert relative_error(found["rest"][0], expected["rest"][0].detach()) <= FP32
    assert found["rest"][1][1:] == [None, 3]
    assert deployed.plan.torch_operations["aten.cat.default"] == 1
    assert "aten.cat.default x1" in str(deployed.plan)


class Where(nn.Module):
    """Max pooling that tells where a maximum was; what is made of it is given."""

    def __init__(self, use) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.pool, self.use = nn.MaxPool2d(2, return_indices=True), use

    def forward(self, x: torch.Tensor) -> object:
        hidden, indices = self.pool(torch.relu(self.before(x)))
        return self.use(self.after, hidden, indices)


USES = {
    "both": lambda after, hidden, indices: F.max_unpool2d(after(hidden), indices, 2),
    "both, returned": lambda after, hidden, indices: (after(hidden), indices),
    "indices alone": lambda after, hidden, indices: indices,
    "values alone": lambda after, hidden, indices: after(hidden),
    "neither": lambda after, hidden, indices: torch.ones(2, 3),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("planes", [True, False])
def test_max_pooling_with_indices_equals_itself_whatever_of_it_is_used(use, planes):
    torch.manual_seed(0)
    model, x = pruned(Where(USES[use]), 0.5).requires_grad_(False), images(2, 3, 12, 10)
    graph = graph_of(model, x)
    expected = model(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for found, wanted in zip(program(graph, planes=planes).program.run([x]), expected, strict=True):
        assert relative_error(found, wanted) <= FP32
    natively = any(isinstance(node.operation, MaxPool) for node in graph.nodes)
    assert natively == (use == "values alone")
