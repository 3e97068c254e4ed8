"""Exported networks in their real engines: path and a constructor -> images -> logits."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sparsetwin.checkpoint import SparseFile, load_sparse_bitmask

Predict = Callable[[torch.Tensor], np.ndarray]


def logits_of(model: nn.Module) -> Predict:
    def predict(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model.eval()(images).numpy()
        return found

    return predict


def from_weights(path: Path, make: Callable[[], nn.Module]) -> Predict:
    model = make()
    with SparseFile.open(path) as file:
        file.load_into(model)
    return logits_of(model)


def from_bitmask(path: Path, make: Callable[[], nn.Module]) -> Predict:
    model = make()
    model.load_state_dict(load_sparse_bitmask(path).tensors)
    return logits_of(model)


def from_onnx(path: Path, make: Callable[[], nn.Module]) -> Predict:
    session = import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"input": images.numpy()})[0])


def from_program(path: Path, make: Callable[[], nn.Module]) -> Predict:
    module = torch.export.load(path).module()
    return lambda images: np.asarray(module(images).detach())


def from_openvino(path: Path, make: Callable[[], nn.Module]) -> Predict:
    openvino = import_module("openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: np.asarray(compiled([images.numpy()])[compiled.outputs[0]])


no_openvino = find_spec("openvino") is None
ENGINES = [
    pytest.param("onnx", "m.onnx", from_onnx, id="onnx"),
    pytest.param("torch-export", "m.pt2", from_program, id="torch-export"),
    pytest.param("safetensors", "m.safetensors", from_weights, id="safetensors"),
    pytest.param("sparse-bitmask", "m.safetensors", from_bitmask, id="sparse-bitmask"),
    pytest.param("openvino", "m.xml", from_openvino, id="openvino",
                 marks=pytest.mark.skipif(no_openvino, reason="openvino, of 180 MB, is not installed")),
]  # fmt: skip
