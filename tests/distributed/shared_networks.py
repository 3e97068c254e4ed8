"""Networks that the processes of a launched command import."""

import os
import signal
import time

import torch
from torch import Tensor, nn


class Convolutional(nn.Module):
    """For 1x8x8 images, with everything that has a state: batch norm and dropout.

    In the process and at the forward pass in training that ``DEED_AT`` names it does the ``DEED``: it kills its
    process, or asks the launcher to stop all.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, num_classes),
        )  # fmt: skip
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
            if f"{os.environ.get('RANK')} {int(self.passes)}" == os.environ.get("DEED_AT"):
                self.do(os.environ["DEED"])
        logits: Tensor = self.layers(images)
        return logits

    def do(self, deed: str) -> None:
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(2)  # until the launcher has passed it on


def plain(*, num_classes: int) -> nn.Module:
    """Return a network whose gradient of a batch is the mean of those of its samples."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, num_classes))
