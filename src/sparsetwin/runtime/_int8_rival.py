"""A dense int8 engine as a rival of whole plans: ONNX Runtime on a network quantised with calibration batches.

Weights get one scale for each output, activations one for each tensor, from the smallest and largest numbers that the
calibration batches gave. What that does to the results is measured on the same batches.
"""

import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._rivals import NotHereError, Runner

NAME = "onnxruntime int8"
_LEAST_AGREEMENT = 0.99  # of the largest of each row of outputs
_MOST_ERROR = 0.05  # where rows have no largest


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How far a quantised network is from the original one on some batches."""

    batches: int
    relative_error: float  # max|y - ref| / max|ref|
    top1_agreement: float | None  # None: the last axis of the results has one element

    @property
    def is_enough(self) -> bool:
        """Whether the engine may take part."""
        if self.top1_agreement is None:
            return self.relative_error <= _MOST_ERROR
        return self.top1_agreement >= _LEAST_AGREEMENT

    def __str__(self) -> str:
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.4f}"
        return f"relative error {self.relative_error:.2g}{agreement} on {self.batches} calibration batches"


def int8_runner(model: nn.Module, call: Call, *, calibration: Sequence[Call], threads: int) -> tuple[Runner, Accuracy]:
    """Return a model in int8 in ONNX Runtime, and how far it is from the model.

    Args:
        model: Float32, in evaluation mode.
        call: Of tensors by position; their shapes are the engine's.
        calibration: Calls of the same kind and shapes.
        threads: Of the engine.

    Raises:
        NotHereError: If ONNX Runtime or the exporter is not installed, or either does not take the model.
    """
    for package in ("onnxruntime", "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise NotHereError(f"{package} is not installed")
    if call.named or len(call.tensors) != len(call.leaves) or len(call.leaves) != len(call.arguments):
        raise NotHereError("takes calls of tensors by position only")
    with torch.no_grad():
        expected = [model(*(leaf.clone() for leaf in batch.tensors)) for batch in calibration]
    if not all(isinstance(found, Tensor) for found in expected):
        raise NotHereError("takes models with one tensor as result only")
    try:
        with tempfile.TemporaryDirectory() as folder, _quietly():
            path = _quantised(model, call, calibration, Path(folder))
            runtime: Any = importlib.import_module("onnxruntime")
            options = runtime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # torch, onnx and onnxruntime raise errors of many classes
        first = str(error).strip().splitlines()
        raise NotHereError(f"{type(error).__name__}: {first[0] if first else ''}") from error
    names = [value.name for value in session.get_inputs()]

    def run(wanted: Call) -> Any:
        feed = {name: leaf.numpy() for name, leaf in zip(names, wanted.tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run, accuracy([run(batch) for batch in calibration], expected)


def accuracy(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Accuracy:
    """Compare results, batch by batch.

    >>> accuracy([torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 2.5]])])
    Accuracy(batches=1, relative_error=0.2, top1_agreement=1.0)
    """
    largest = max(float(y.abs().max()) for y in expected)
    error = max(float((y.double() - ref.double()).abs().max()) for y, ref in zip(found, expected, strict=True))
    agreement = None
    if all(ref.dim() > 1 and ref.shape[-1] > 1 for ref in expected):
        same = [y.argmax(-1) == ref.argmax(-1) for y, ref in zip(found, expected, strict=True)]
        agreement = float(torch.cat([part.reshape(-1) for part in same]).double().mean())
    return Accuracy(batches=len(expected), relative_error=error / max(largest, 1e-30), top1_agreement=agreement)


def _quantised(model: nn.Module, call: Call, calibration: Sequence[Call], folder: Path) -> Path:
    tools: Any = importlib.import_module("onnxruntime.quantization")
    plain, found = folder / "plain.onnx", folder / "int8.onnx"
    names = [f"input_{number}" for number in range(len(call.arguments))]
    with torch.no_grad():
        torch.onnx.export(model, call.arguments, str(plain), dynamo=True, input_names=names, verbose=False)

    class Batches(tools.CalibrationDataReader):  # type: ignore[misc]
        """Hands out the calibration batches one at a time."""

        def __init__(self) -> None:
            self._rest = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._rest, None)
            if batch is None:
                return None
            return {name: leaf.numpy() for name, leaf in zip(names, batch.tensors, strict=True)}

    tools.quantize_static(
        str(plain), str(found), Batches(), quant_format=tools.QuantFormat.QDQ, per_channel=True,
        activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8, reduce_range=not _adds_exactly(),
    )  # fmt: skip
    return found


def _adds_exactly() -> bool:
    """Tell whether sums of int8 products are exact (VNNI, or ARM's dot products); weights get seven bits elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or any(name in cpuinfo.read_text() for name in ("vnni", "asimddp"))


@contextmanager
def _quietly() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
