"""Channels may lie last between layers; what is returned, or read by how it lies, is as in the model."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import FP32, Slim, graph_of, images, program, pruned, relative_error, slim

from sparsetwin.runtime import deploy, load
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._graph import Torch
from sparsetwin.runtime._rivals import channels_last_runner

USES = {
    "returned": lambda y: y,
    "activated": lambda y: F.relu(y),
    "pooled": lambda y: F.max_pool2d(F.relu(y), 2),
    "by PyTorch": lambda y: torch.sigmoid(y),
    "added to another": lambda y: y + y[:1],
    "flattened": lambda y: y.flatten(2),
    "seen otherwise": lambda y: y.permute(0, 2, 3, 1),
    "viewed": lambda y: y.view(2, -1),
    "viewed after pooling": lambda y: F.avg_pool2d(y, 2).view(2, -1),
    "viewed after contiguous": lambda y: y.contiguous().view(2, -1),
    "shuffled and viewed": lambda y: F.pixel_shuffle(y, 2).view(-1),
    "by strides": lambda y: torch.as_strided(y, (4, 5), (3, 2)),
    "as complex numbers": lambda y: torch.view_as_real(torch.view_as_complex(y[..., :2].contiguous())),
    "twice": lambda y: (y, {"half": y.chunk(2, 1)[0], "again": F.conv2d(y, torch.ones(8, 1, 1, 1), groups=8)}),
}


class Used(nn.Module):
    def __init__(self, use) -> None:
        super().__init__()
        self.inner, self.use = nn.Conv2d(3, 8, 3, padding=1), use

    def forward(self, x: Tensor) -> object:
        return self.use(self.inner(x))


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("use", USES)
def test_results_are_right_and_contiguous_where_the_models_are(use, planes):
    torch.manual_seed(0)
    model, x = pruned(Used(USES[use]), 0.5).requires_grad_(False), images(2, 3, 6, 10)
    results = program(graph_of(model, x), planes=planes).program.run([x])
    for found, expected in zip(results, pytree.tree_leaves(model(x)), strict=True):
        assert relative_error(found, expected) <= FP32
        assert found.is_contiguous() or not expected.is_contiguous()


def test_channels_that_lie_last_are_turned_back_in_an_eager_model_too():
    model, x = Used(torch.sigmoid).requires_grad_(False), images(2, 3, 6, 10)
    last = Used(torch.sigmoid).requires_grad_(False)
    last.load_state_dict(model.state_dict())
    found = channels_last_runner(last.to(memory_format=torch.channels_last))(Call((x,), {}, (x,), None))
    assert found.is_contiguous()
    assert relative_error(found, model(x)) <= FP32


def test_networks_whose_results_have_no_channels_last_need_no_node_for_it():
    graph = graph_of(slim(), images(1, 3, 32, 32))
    assert not any(
        "contiguous" in str(node.operation.function) for node in graph.nodes if isinstance(node.operation, Torch)
    )


class Features(Slim):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv(torch.relu(self.bn(self.stem(images))))


def test_networks_of_convolutions_still_take_new_sizes_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = pruned(Features(), 0.3).requires_grad_(False)
    deploy(model, images(1, 3, 32, 32), rivals=()).save(tmp_path / "f")
    found = load(tmp_path / "f")(images(2, 3, 24, 28))
    assert found.is_contiguous()
    assert relative_error(found, model(images(2, 3, 24, 28))) <= FP32
