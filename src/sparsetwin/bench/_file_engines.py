"""Engines that read ONNX files."""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetwin.bench._entrants import Case, Entrant, NotHereError, OnnxFiles, in_process


def onnx_runtime(case: Case, *, int8: bool) -> Entrant:
    """Return ONNX Runtime on its CPU provider."""
    runtime = _need("onnxruntime", "'sparsetwin[export]'")
    path = quantized(case.files) if int8 else case.files.fp32()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.settings.threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads are not to disturb the next turn
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: case.inputs.numpy()}
    return in_process(lambda: torch.from_numpy(session.run(None, feed)[0]), f"version {runtime.__version__}")


def openvino(case: Case, *, precision: str) -> Entrant:
    """Return OpenVINO, one stream, told the number of threads and the precision."""
    package = _need("openvino", "openvino")
    path = quantized(case.files) if precision == "int8" else case.files.fp32()
    core = package.Core()
    graph = core.read_model(path)
    graph.reshape(list(case.inputs.shape))
    hint = "bf16" if precision == "bf16" else "f32"  # what is quantized stays int8 under both
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": case.settings.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the process is pinned
    }
    engine = core.compile_model(graph, "CPU", settings)
    if precision == "bf16" and engine.get_property("INFERENCE_PRECISION_HINT") != package.Type.bf16:
        raise NotHereError("OpenVINO computes in fp32 on this processor, whatever it is asked")
    request, given = engine.create_infer_request(), case.inputs.numpy()

    def run() -> Tensor:
        return torch.from_numpy(request.infer([given], share_inputs=True, share_outputs=True)[engine.output(0)])

    return in_process(run, f"version {package.__version__.split('-')[0]}")


def quantized(files: OnnxFiles) -> Path:
    """Return the network in int8: weights for each output, activations measured on the samples; made at first use.

    Raises:
        NotHereError: If ONNX Runtime, which quantizes, is missing.
    """
    path = files.folder / "int8.onnx"
    if path.exists():
        return path
    _need("onnxruntime", "'sparsetwin[export]'")
    tools: Any = importlib.import_module("onnxruntime.quantization")
    source = files.fp32()
    part = files.folder / "part.onnx"
    with _without_warnings():
        tools.quantize_static(
            str(source), str(part), _readings(tools, files.samples), quant_format=tools.QuantFormat.QDQ,
            activation_type=tools.QuantType.QUInt8, weight_type=tools.QuantType.QInt8, per_channel=True,
            reduce_range=not _has_vnni(),
        )  # fmt: skip
    return part.replace(path)


def _readings(tools: Any, samples: Tensor) -> Any:
    class Samples(tools.CalibrationDataReader):  # type: ignore[misc]
        """Hands out the samples one at a time."""

        def __init__(self) -> None:
            self._rest = iter(torch.split(samples, 1))

        def get_next(self) -> dict[str, Any] | None:
            sample = next(self._rest, None)
            return None if sample is None else {"input": sample.numpy()}

    return Samples()


def _has_vnni() -> bool:
    """Tell whether products of int8 are added without saturation; weights get seven bits elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "vnni" in cpuinfo.read_text() or "asimddp" in cpuinfo.read_text()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _need(package: str, install: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise NotHereError(f"{package} is not installed: pip install {install}")
    return importlib.import_module(package)
