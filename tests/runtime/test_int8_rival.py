"""An int8 engine as a rival: made with calibration batches, checked on them, and left out with a reason."""

import importlib.util
import sys

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels are generated with llvmlite")

from runtime_cases import images, slim

from sparsetwin.errors import ConfigError
from sparsetwin.runtime import deploy
from sparsetwin.runtime._int8_rival import NAME, Accuracy, accuracy, int8_runner
from sparsetwin.runtime._rivals import NotHereError

ENGINE = all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx", "onnxscript"))
X = (4, 3, 16, 16)


@pytest.mark.skipif(not ENGINE, reason="onnxruntime, onnx or onnxscript is not installed")
def test_a_quantised_network_is_near_the_original_and_what_it_loses_stands_in_the_plan():
    model, batches = slim(), [images(*X, seed=seed) for seed in range(3)]
    deployed = deploy(model, batches[0], allow_reduced_precision=True, calibration=batches, rivals=())
    (note,) = [note for note in deployed.plan.notes if note.startswith(NAME)]
    assert "relative error" in note
    assert "top-1 agreement" in note
    assert "on 3 calibration batches" in note
    assert (NAME in deployed.plan.candidates) != (NAME in deployed.plan.skipped)
    call = deployed._caller.call((batches[0],), {})
    calls = [deployed._caller.call((batch,), {}) for batch in batches]
    run, found = int8_runner(deployed._source.value.model, call, calibration=calls, threads=1)
    y, expected = run(call), model(batches[0]).detach()
    assert y.shape == expected.shape
    assert 0 < found.relative_error < 0.1
    assert float((y - expected).abs().max() / expected.abs().max()) < 0.2
    assert not torch.equal(y, expected)  # it is another engine


def test_errors_and_agreement_are_those_of_all_batches():
    expected = [torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.tensor([[0.0, 1.0]])]
    found = [torch.tensor([[1.0, 2.0], [3.0, 3.5]]), torch.tensor([[0.0, 1.5]])]
    assert accuracy(found, expected) == Accuracy(batches=2, relative_error=0.25, top1_agreement=2 / 3)
    assert accuracy([torch.ones(3, 1)], [torch.ones(3, 1)]).top1_agreement is None


@pytest.mark.parametrize(
    ("error", "agreement", "enough"), [(0.5, 0.99, True), (0.01, 0.98, False), (0.05, None, True), (0.06, None, False)]
)
def test_an_engine_that_is_too_far_off_does_not_take_part(error, agreement, enough):
    assert Accuracy(batches=1, relative_error=error, top1_agreement=agreement).is_enough == enough


def test_what_is_not_installed_is_named_in_the_plan(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    deployed = deploy(
        torch.nn.Linear(4, 4).eval(), images(2, 4), allow_reduced_precision=True, calibration=[images(2, 4)], rivals=()
    )
    assert deployed.plan.skipped[NAME] == "onnxruntime is not installed"


def test_calls_that_the_engine_does_not_take_are_told_so():
    if not ENGINE:
        pytest.skip("onnxruntime, onnx or onnxscript is not installed")
    deployed = deploy(slim(), images(*X), rivals=())
    call = deployed._caller.call((images(*X),), {"scale": 2.0})
    with pytest.raises(NotHereError, match="by position only"):
        int8_runner(slim(), call, calibration=[call], threads=1)


def test_calibration_that_cannot_be_is_refused():
    model, x = slim(), images(*X)
    with pytest.raises(ConfigError, match="needs allow_reduced_precision=True"):
        deploy(model, x, calibration=[x])
    with pytest.raises(ConfigError, match="holds no batch"):
        deploy(model, x, calibration=[], allow_reduced_precision=True)
    with pytest.raises(ConfigError, match="a calibration batch is 4x3x17x16 float32; expected the example's 4x3x16x16"):
        deploy(model, x, calibration=[images(4, 3, 17, 16)], allow_reduced_precision=True)
