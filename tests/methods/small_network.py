"""What tests of methods share: a small network with a convolution and batch norm, its batches, its loss."""

import torch
from torch import nn

PRUNED = ("0.weight", "4.weight", "6.weight")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 1, 6, 6, generator=generator), torch.randint(4, (6,), generator=generator)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    inputs, labels = batch(step)
    return nn.functional.cross_entropy(model(inputs), labels)
