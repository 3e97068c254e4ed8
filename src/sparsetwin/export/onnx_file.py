"""ONNX: the file that most engines read. Zeros stay zeros in it; they take as much room as other numbers."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sparsetwin.errors import ExportError
from sparsetwin.export._checking import check_masks, compare, lost_zeros
from sparsetwin.export._example import (
    TRACEABLE,
    Example,
    as_inputs,
    batch_axes,
    evaluating,
    first_line,
    on_cpu,
    quietly,
)
from sparsetwin.export._files import need, replacing
from sparsetwin.masking import Masks

INSTALL = "'sparsetwin[export]'"
_LOWEST_OPSET, _MOST_BYTES = 18, 2**31 - 2**20  # a protobuf message holds 2 GiB
_NO_MASKS: Masks = {}
_NO_NOTES: Mapping[str, str] = MappingProxyType({})


def export_onnx(
    model: nn.Module,
    example: Example,
    *,
    path: str | Path,
    masks: Masks = _NO_MASKS,
    opset: int = _LOWEST_OPSET,
    notes: Mapping[str, str] = _NO_NOTES,
) -> bool:
    """Write a model as an ONNX file with a free batch size, and check it.

    Weights keep the names of the ``state_dict``. torch's optimizer of graphs is used if every masked weight survives
    it under its name; batch norms are then folded into the convolutions before them. The file holds no paths.

    Args:
        model: On the CPU; it is traced in evaluation mode and put back into its own.
        example: One input (batch, ...) or a tuple of them.
        path: The file; it is replaced only when the new one is complete and checked.
        masks: Name -> bool, True keeps: every pruned weight has to be zero in the file.
        opset: Version of ONNX's operators, 18 or later, and one that the installed onnx knows.
        notes: Texts to keep as the file's metadata, such as the data's licence.

    Returns:
        Whether ONNX Runtime is installed and gave the model's outputs, for one sample and for larger batches.

    Raises:
        ExportError: If onnx or onnxscript is missing, with the command that installs them, the model cannot be
            traced, a pruned weight is not zero, in the model or in the file, ONNX Runtime's outputs differ, or the file
            cannot be written.
    """
    onnx = need("onnx", to="exporting to ONNX", install=INSTALL)
    need("onnxscript", to="exporting to ONNX", install=INSTALL)
    _check_request(model, opset, newest=onnx.defs.onnx_opset_version())
    check_masks(model, masks)
    inputs = as_inputs(example)
    with evaluating(model), replacing(Path(path)) as temporary:
        proto = _traced(model, inputs, opset=opset, masks=masks, to_array=onnx.numpy_helper.to_array)
        onnx.helper.set_model_props(proto, dict(notes))
        onnx.checker.check_model(proto)
        onnx.save_model(proto, temporary)
        return check_onnx(model, inputs, temporary)


def check_onnx(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> bool:
    """Compare a file with its model in ONNX Runtime; return False if that is not installed.

    Raises:
        ExportError: If the outputs differ, or ONNX Runtime does not load the file.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    runtime = importlib.import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # of many classes
        raise ExportError(
            f"ONNX Runtime {runtime.__version__} does not load what {type(model).__name__} became: "
            f"{first_line(error)}; a newer one may, or another opset"
        ) from error
    names = [value.name for value in session.get_inputs()]

    def run(batch: tuple[Tensor, ...]) -> list[Any]:
        feed = {name: value.numpy(force=True) for name, value in zip(names, batch, strict=True)}
        outputs: list[Any] = session.run(None, feed)
        return outputs

    compare(model, inputs, run, name="ONNX Runtime")
    return True


def _check_request(model: nn.Module, opset: int, *, newest: int) -> None:
    on_cpu(model)
    if not _LOWEST_OPSET <= opset <= newest:
        raise ExportError(f"torch writes ONNX opset {_LOWEST_OPSET} and later, onnx here up to {newest}; got {opset}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _MOST_BYTES:
        raise ExportError(f"an ONNX file holds 2 GiB, the model has {size / 2**30:.1f} GiB; export it to torch-export")


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], *, opset: int, masks: Masks, to_array: Any) -> Any:
    """Return the ONNX message."""
    names = ["input"] if len(inputs) == 1 else [f"input_{index}" for index in range(len(inputs))]
    try:
        with quietly():
            program = torch.onnx.export(
                model, inputs, dynamo=True, opset_version=opset, dynamic_shapes=batch_axes(inputs), input_names=names,
                optimize=False, verbose=False,
            )  # fmt: skip
            assert program is not None
            plain = program.model_proto
            program.optimize()
            optimized = program.model_proto
    except Exception as error:  # torch's own errors are of many classes
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: {first_line(error)}; {TRACEABLE}"
        ) from error
    found = {entry.domain: entry.version for entry in plain.opset_import}.get("")
    if found != opset:  # torch leaves a graph as it is if it cannot convert it
        raise ExportError(
            f"torch gives {type(model).__name__} in opset {found}, asked for {opset}; use --opset {found}"
        )
    for proto in (optimized, plain):
        lost = lost_zeros({value.name: to_array(value) for value in proto.graph.initializer}, masks)
        if not lost:
            return _without_traces(proto)
    raise ExportError(f"the ONNX file lacks {lost[0]} with its pruned weights at zero ({len(lost)} weights)")


def _without_traces(proto: Any) -> Any:
    """Remove what torch notes of each node: lines of source files, with their paths."""
    del proto.graph.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del part.metadata_props[:]
    for part in proto.graph.initializer:
        del part.metadata_props[:]
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
    return proto
