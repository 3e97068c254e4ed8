"""Small networks for 8x8 images, which recipes name as ``recipe_networks:...``."""

from torch import nn


def linear(*, hidden: int = 12, num_classes: int = 10) -> nn.Module:
    """Return two linear layers with a batch norm between them."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
    )


def convolution(*, num_classes: int = 10) -> nn.Module:
    """Return a convolution and a linear layer."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
