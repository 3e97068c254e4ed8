"""OpenVINO: an ``.xml`` file with the graph and a ``.bin`` file with the weights."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sparsetwin.errors import ExportError
from sparsetwin.export._checking import compare, lost_zeros
from sparsetwin.export._example import Example, as_inputs, evaluating, first_line
from sparsetwin.export._files import need, replacing
from sparsetwin.export.onnx_file import export_onnx
from sparsetwin.masking import Masks

_NO_MASKS: Masks = {}
_NO_NOTES: Mapping[str, str] = MappingProxyType({})


def export_openvino(
    model: nn.Module,
    example: Example,
    *,
    path: str | Path,
    masks: Masks = _NO_MASKS,
    notes: Mapping[str, str] = _NO_NOTES,
) -> None:
    """Write a model for OpenVINO, by way of ONNX, with a free batch size and fp32 weights, and check it there.

    Args:
        model: On the CPU; it is traced in evaluation mode and put back into its own.
        example: One input (batch, ...) or a tuple of them.
        path: The ``.xml`` file; weights go to the ``.bin`` file beside it. Both are replaced when they are complete.
        masks: Name -> bool, True keeps: every pruned weight has to be zero in the files.
        notes: Texts to keep in the graph's ``rt_info`` under ``sparsetwin``, such as the data's licence.

    Raises:
        ExportError: If openvino, onnx or onnxscript is missing, with the command that installs it, the name does not
            end in ``.xml``, the model cannot be traced, a pruned weight is not zero, in the model or in the files,
            OpenVINO's outputs differ, or a file cannot be written.
    """
    openvino = need("openvino", to="exporting to OpenVINO", install="openvino")
    path = Path(path)
    if path.suffix != ".xml":
        raise ExportError(f"OpenVINO's graph is a file *.xml with its weights in *.bin beside it, got {path.name}")
    inputs = as_inputs(example)
    core = openvino.Core()
    with replacing(path) as temporary:
        through = temporary.with_suffix(".onnx")
        export_onnx(model, example, path=through, masks=masks)
        try:
            graph = core.read_model(through)
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO does not read what {type(model).__name__} became: {first_line(error)}; a newer one may"
            ) from error
        for key, value in notes.items():
            graph.set_rt_info(value, ["sparsetwin", key])
        openvino.save_model(graph, temporary, compress_to_fp16=False)
        through.unlink()
        saved = core.read_model(temporary)
        lost = lost_zeros(_constants(saved), masks)
        if lost:
            raise ExportError(f"OpenVINO's graph lacks {lost[0]} with its pruned weights at zero ({len(lost)} weights)")
        # bfloat16 is OpenVINO's choice where the processor is fast at it; the check is of the weights, in fp32
        compiled = core.compile_model(saved, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        with evaluating(model):
            compare(model, inputs, lambda batch: _run(compiled, batch), name="OpenVINO")


def _run(compiled: Any, batch: tuple[Tensor, ...]) -> list[Any]:
    results = compiled([value.numpy(force=True) for value in batch])
    return [results[output] for output in compiled.outputs]


def _constants(graph: Any) -> dict[str, Any]:
    """Return the graph's constants by name."""
    return {node.get_friendly_name(): node.get_data() for node in graph.get_ops() if node.get_type_name() == "Constant"}
