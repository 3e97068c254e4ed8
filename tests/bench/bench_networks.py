"""Small pruned networks to time, and a stand-in for an interpreter that has deepsparse."""

import os
import sys
from pathlib import Path

import torch
from torch import nn

_DEEPSPARSE = """
import os, sys
import numpy
import onnxruntime

__version__ = "stand-in"
print("an engine that prints when it is imported")

class Engine:
    fraction_of_supported_ops = 0.875

    def __init__(self, model, batch_size, num_cores):
        if os.environ.get("FAILS_AT") == "start":
            raise RuntimeError("unsupported masks")
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.calls = 0

    def run(self, inputs):
        self.calls += 1
        if os.environ.get("FAILS_AT") == str(self.calls):
            sys.stderr.write("illegal masks\\n")
            os._exit(139)
        return self.session.run(None, {"input": inputs[0]})
"""


def pruned_network() -> nn.Module:
    """A network for 1x8x8 images, with nine of ten weights of its convolution and its first linear layer zero."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    for index in (0, 4):
        weight = network[index].weight.detach()
        weight[torch.rand(weight.shape) < 0.9] = 0
    return network.eval()


def deepsparse_python(folder: Path, *, fails_at: str = "") -> Path:
    """Return an interpreter that finds a ``deepsparse`` whose engine is ONNX Runtime."""
    (folder / "deepsparse.py").write_text(_DEEPSPARSE)
    found = folder / "python"
    paths = os.pathsep.join([str(folder), *(path for path in sys.path if path)])
    found.write_text(f'#!/bin/sh\nFAILS_AT="{fails_at}" PYTHONPATH="{paths}" exec "{sys.executable}" "$@"\n')
    found.chmod(0o755)
    return found
