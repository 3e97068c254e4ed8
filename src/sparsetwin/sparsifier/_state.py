"""What a `Sparsifier` saves and how it is read back: plain data and tensors only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetwin.errors import StateError
from sparsetwin.masking import Masks, count_pruned_nonzero
from sparsetwin.methods import Method, SparseState
from sparsetwin.schedules import Phase

VERSION = 1


@dataclass(frozen=True)
class LoadedState:
    """Saved state that was found to fit."""

    steps: int
    phase: int
    masks: Masks
    buffers: dict[str, dict[str, Tensor]]
    generator_state: Tensor | None


def dump_state(method: Method, state: SparseState, *, steps: int, phase: Phase | None) -> dict[str, Any]:
    """Return the state as ints, floats, strings and tensors in dicts and lists."""
    dumped: dict[str, Any] = {
        "version": VERSION,
        "method": method.config(),
        "steps": steps,
        "phase": -1 if phase is None else phase.index,
        "masks": dict(state.masks),
        "buffers": {what: dict(tensors) for what, tensors in state.buffers.items()},
    }
    if method.draws:
        dumped["rng"] = state.generator.get_state()
    return dumped


def read_state(state: Mapping[str, Any], method: Method, weights: Mapping[str, Tensor]) -> LoadedState:
    """Check saved state against a method and the weights it is to be loaded for.

    Raises:
        StateError: Naming the first thing that does not fit.
    """
    version = state.get("version")
    if version != VERSION:
        raise StateError(f"sparsifier state of version {version!r}; this release reads version {VERSION}")
    _check_method(state["method"], method.config())
    masks = _fitted("mask", state["masks"], weights, dtype=torch.bool)
    if masks and tuple(masks) != tuple(weights):
        missing = sorted(set(weights) - set(masks))
        raise StateError(f"the saved masks lack {', '.join(missing[:3])}; were the targets the same?")
    alive = count_pruned_nonzero(weights, masks)
    if alive:
        name, count = next(iter(alive.items()))
        raise StateError(
            f"{count} pruned weights of {name} are not zero; load the model, then the optimizer, then the sparsifier"
        )
    if not -1 <= state["phase"] < len(method.schedule.phases) or state["steps"] < 0:
        raise StateError(f"phase {state['phase']} at step {state['steps']} is not in this schedule")
    buffers = {what: _fitted(what, tensors, weights) for what, tensors in state["buffers"].items()}
    return LoadedState(state["steps"], state["phase"], masks, buffers, state.get("rng"))


def _check_method(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    for field in [*current, *(field for field in saved if field not in current)]:
        if field not in saved or field not in current or saved[field] != current[field]:
            raise StateError(
                f"the saved state has {field} = {saved.get(field, 'nothing')!r}, "
                f"this method has {current.get(field, 'nothing')!r}"
            )


def _fitted(
    what: str, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copy saved tensors to the devices and memory formats of the weights, in the order of the weights."""
    for name, tensor in saved.items():
        if name not in weights:
            raise StateError(f"the saved state has a {what} for {name}, which is no target of this model")
        if tensor.shape != weights[name].shape:
            raise StateError(
                f"the saved {what} of {name} has shape {tuple(tensor.shape)}, the weight {tuple(weights[name].shape)}"
            )
    return {
        name: torch.empty_like(weight, dtype=dtype or saved[name].dtype, requires_grad=False).copy_(saved[name])
        for name, weight in weights.items()
        if name in saved
    }
