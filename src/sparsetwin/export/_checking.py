"""Whether an exported network is the one that was given: the same outputs, and every pruned weight still zero."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsetwin.errors import ExportError, StateError
from sparsetwin.export._example import batches, outputs_of
from sparsetwin.masking import Masks, count_pruned_nonzero

TOLERANCE = 1e-4
"""Largest difference of an output over the largest output, in fp32: engines sum in another order."""

Engine = Callable[[tuple[Tensor, ...]], Sequence[Any]]
"""Inputs -> outputs, as arrays or tensors."""


def check_masks(model: nn.Module, masks: Masks) -> None:
    """Refuse masks that are not those of the model.

    Raises:
        ExportError: If a weight is missing or of another shape, or a pruned one is not zero.
    """
    try:
        alive = count_pruned_nonzero(model.state_dict(), masks)
    except StateError as error:
        raise ExportError(f"the masks are not those of {type(model).__name__}: {error}") from error
    if alive:
        name, number = next(iter(alive.items()))
        raise ExportError(
            f"{number} pruned weights of {name} are not zero; apply the masks with sparsetwin.masking.apply_masks_ "
            "before exporting"
        )


def compare(model: nn.Module, inputs: tuple[Tensor, ...], engine: Engine, *, name: str) -> None:
    """Run a model and its exported form on several batches.

    Args:
        model: In evaluation mode.
        inputs: Of the model, a batch of two or more.
        engine: Runs the exported form.
        name: Of the engine, for messages.

    Raises:
        ExportError: If an output has another shape or differs by more than `TOLERANCE`.
    """
    for which, batch in batches(inputs).items():
        expected = outputs_of(model, batch)
        found = engine(batch)
        if len(found) != len(expected):
            raise ExportError(
                f"the model has {len(expected)} outputs, its export in {name} {len(found)}; return tensors alone, in a "
                "fixed order"
            )
        for reference, output in zip(expected, found, strict=True):
            difference = relative_difference(np.asarray(output), reference.numpy(force=True))
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"{name} gives another output than PyTorch for {which}: they differ by {difference:.2g} of the "
                    f"largest, expected at most {TOLERANCE:g}; a network can be exported if its output depends on its "
                    "input alone, and on one sample at a time"
                )


def relative_difference(found: Any, reference: Any) -> float:
    """Return max|found - reference| / max|reference|; infinity if the shapes or the places of NaN differ."""
    if found.shape != reference.shape:
        return float("inf")
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    same = (found == reference) | (np.isnan(found) & np.isnan(reference))
    if same.all():
        return 0.0
    largest = np.abs(reference[np.isfinite(reference)]).max(initial=0.0)
    difference = np.abs(found - reference)[~same].max()
    return float(difference / largest) if np.isfinite(difference) and largest else float("inf")


def lost_zeros(constants: Mapping[str, Any], masks: Masks) -> list[str]:
    """Return the masked weights that are not among an export's constants with their pruned elements at zero.

    Args:
        constants: Name -> array of the exported form.
        masks: Canonical name -> bool.
    """
    return [name for name, mask in masks.items() if not _is_pruned(constants.get(name), mask.numpy(force=True))]


def _is_pruned(values: Any, mask: Any) -> bool:
    return values is not None and values.shape == mask.shape and not np.any(values[~mask])
