"""Networks that a user might bring along; small enough to train in a moment."""

import random
import time

import numpy as np
import torch
from torch import Tensor, nn


def convolutional(*, num_classes: int, width: int = 8, dropout: float = 0.1) -> nn.Module:
    """Return a network for 1x8x8 images with everything that has a state: batch norm and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(16 * width, num_classes),
    )  # fmt: skip


class Linear(nn.Module):
    """Two linear layers and no batch norm."""

    def __init__(self, num_classes: int = 10, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, hidden)
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(images.flatten(1)).relu())
        return logits


def tells_threads(*, num_classes: int) -> nn.Module:
    """Print the thread count, and return a small network."""
    print("threads", torch.get_num_threads())
    return Linear(num_classes)


class Drawing(Linear):
    """Draws from every global generator while it trains, and keeps a draw that its state does not hold."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.register_buffer("mixing", torch.randn(64, 64) / 8, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        mixed = images.flatten(1) @ self.mixing
        if self.training:
            mixed = mixed * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(64)
        return super().forward(mixed)


not_a_model = 3


def gives_no_module() -> int:
    """Return something else."""
    return 3


class slow(Linear):
    """Takes five seconds for its 24th step."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == 24:
                for _ in range(500):
                    time.sleep(0.01)
        return super().forward(images)


class slow_from_the_start(Linear):
    """Takes half a minute for its first step."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(30)
        return super().forward(images)


class _Counting(Linear):
    """Counts the steps that it is trained for."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(images)


class breaks(_Counting):
    """Gives NaN at its 51st step."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * float("nan") if self.training and self.calls == 51 else logits


class spoils(_Counting):
    """Has a finite loss and an infinite gradient at its 42nd step."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if self.training and self.calls == 42 and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        return logits
