"""OpenVINO as a rival: calls run at once, each with a request of its own. A stand-in where it is not installed."""

import importlib.machinery
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._rivals import openvino_runner

TOGETHER = 4


class Request:
    """As OpenVINO's: one call at a time; the result lies in memory of the request."""

    def __init__(self, compiled: "Compiled") -> None:
        self.compiled, self.busy = compiled, threading.Lock()
        self.memory = np.zeros((1, 3), np.float32)

    def infer(self, inputs: list[Any]) -> dict[str, Any]:
        if not self.busy.acquire(blocking=False):
            raise RuntimeError("Infer Request is busy")
        try:
            if self.compiled.meet is not None:
                self.compiled.meet.wait()  # until all callers are here
            np.multiply(inputs[0], 2, out=self.memory)
            return {"y": self.memory}
        finally:
            self.busy.release()


class Compiled:
    """A compiled model."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.meet: threading.Barrier | None = None

    def create_infer_request(self) -> Request:
        self.requests.append(Request(self))
        return self.requests[-1]

    def output(self, number: int) -> str:
        return "y"


@pytest.fixture
def compiled(monkeypatch) -> Compiled:
    found, module = Compiled(), types.ModuleType("openvino")
    module.__spec__ = importlib.machinery.ModuleSpec("openvino", None)
    module.convert_model = lambda model, example_input: types.SimpleNamespace(reshape=lambda shapes: None)
    module.Core = lambda: types.SimpleNamespace(compile_model=lambda *arguments: found)
    monkeypatch.setitem(sys.modules, "openvino", module)
    return found


def call_of(x: torch.Tensor) -> Call:
    return Call((x,), {}, (x,), None)


def test_calls_of_openvino_may_run_at_once(compiled):
    inputs = [torch.full((1, 3), float(number)) for number in range(TOGETHER)]
    run = openvino_runner(nn.Identity(), call_of(inputs[0]), threads=1)
    for _ in range(3):
        assert torch.equal(run(call_of(inputs[1])), 2 * inputs[1])
    assert len(compiled.requests) == 1  # one after the other, one is enough
    compiled.meet = threading.Barrier(TOGETHER, timeout=30)
    with ThreadPoolExecutor(TOGETHER) as executor:
        for _ in range(5):
            found = list(executor.map(run, map(call_of, inputs)))
            assert all(torch.equal(y, 2 * x) for x, y in zip(inputs, found, strict=True))
    assert len(compiled.requests) == TOGETHER  # they are used again


def test_a_call_that_fails_gives_its_request_back(compiled):
    x = torch.ones(1, 3)
    run = openvino_runner(nn.Identity(), call_of(x), threads=1)
    with pytest.raises(ValueError, match="broadcast"):
        run(call_of(torch.ones(1, 4)))
    assert torch.equal(run(call_of(x)), 2 * x)
    assert len(compiled.requests) == 1
