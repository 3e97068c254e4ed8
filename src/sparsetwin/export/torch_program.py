"""``torch.export``: a traced network that torch runs without its Python code (``torch.export.load(path).module()``)."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

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
    outputs_of,
    quietly,
)
from sparsetwin.export._files import replacing
from sparsetwin.masking import Masks

NOTES_FILE = "sparsetwin.json"
_NO_MASKS: Masks = {}
_NO_NOTES: Mapping[str, str] = MappingProxyType({})


def export_program(
    model: nn.Module,
    example: Example,
    *,
    path: str | Path,
    masks: Masks = _NO_MASKS,
    notes: Mapping[str, str] = _NO_NOTES,
) -> None:
    """Write a model as a ``.pt2`` file with a free batch size, load it again and compare.

    Args:
        model: On the CPU; it is traced in evaluation mode and put back into its own.
        example: One input (batch, ...) or a tuple of them.
        path: The file, ``*.pt2``; it is replaced only when the new one is complete and checked.
        masks: Name -> bool, True keeps: every pruned weight has to be zero in the file.
        notes: Texts to keep in the file, such as the data's licence; ``torch.export.load(path, extra_files=...)``
            gives them back as JSON under the name ``sparsetwin.json``.

    Raises:
        ExportError: If the name does not end in ``.pt2``, the model cannot be traced, a pruned weight is not zero, in
            the model or in the file, the outputs differ, or the file cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"torch.export loads files *.pt2, got {Path(path).name}")
    on_cpu(model)
    check_masks(model, masks)
    inputs = as_inputs(example)
    with evaluating(model), replacing(Path(path)) as temporary:
        try:
            with quietly():
                program = torch.export.export(model, inputs, dynamic_shapes=batch_axes(inputs))
                text = json.dumps(dict(notes), sort_keys=True)
                torch.export.save(program, temporary, extra_files={NOTES_FILE: text})
                loaded = torch.export.load(temporary)
        except OSError:
            raise
        except Exception as error:  # torch's own errors are of many classes
            raise ExportError(f"{type(model).__name__} cannot be traced: {first_line(error)}; {TRACEABLE}") from error
        lost = lost_zeros({name: value.numpy(force=True) for name, value in loaded.state_dict.items()}, masks)
        if lost:
            raise ExportError(f"the program lacks {lost[0]} with its pruned weights at zero ({len(lost)} weights)")
        module = loaded.module()
        compare(model, inputs, lambda batch: outputs_of(module, batch), name="the loaded program")
