"""What the tests of deployed networks share: pruned networks with batch norms that do something, and their programs."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsetwin.kernels import Target, host_target
from sparsetwin.runtime._choices import Choice
from sparsetwin.runtime._entries import Made, make
from sparsetwin.runtime._fuse import fuse
from sparsetwin.runtime._graph import Graph
from sparsetwin.runtime._lowering import can_use_planes
from sparsetwin.runtime._products import Packed
from sparsetwin.runtime._trace import trace

FP32 = 1e-5  # max|y - ref| / max|ref|, the bound that the library promises
FP16 = 5e-3  # the same for a network with float16 arithmetic


def relative_error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    return float((y.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def pruned(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Prune all convolutions and linears at random; give batch norms statistics and weights as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) or type(module).__name__ == "Conv1D":
            weight = module.weight.data
            weight *= torch.rand(weight.shape, generator=generator) < density
    return model.eval()


def graph_of(model: nn.Module, *arguments: Tensor) -> Graph:
    return fuse(trace(model, arguments, {}))


def program(graph: Graph, *, planes: bool = True, threads: int = 1) -> Made:
    """A program with every node on planes that can be, or with none; nothing is measured."""
    choices = {
        node.output: Choice(engine="planes" if planes and can_use_planes(graph, node) else "dense")
        for node in graph.nodes
    }
    return make(graph, choices, packed=Packed(), threads=threads)


def emulated_half() -> Target:
    """Float16 arithmetic as LLVM puts it together where there is none; nothing that a user could ask for."""
    return replace(host_target(), name="emulated", registers=32, halves=True)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Slim(nn.Module):
    """Convolutions of several kinds, a shortcut, pooling and a linear layer: small, for what is not about networks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = self.pool(torch.relu(self.bn(self.stem(images))))
        hidden = torch.relu(self.conv(hidden) + hidden)
        hidden = nn.functional.silu(self.depthwise(hidden))
        return self.head(hidden.mean((2, 3))) * scale


def slim(density: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return pruned(Slim(), density)
