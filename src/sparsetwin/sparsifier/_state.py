"""What a `Sparsifier` saves and how it is read back: plain data and tensors only."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from sparsetwin._compat import is_sharded, local
from sparsetwin.errors import StateError
from sparsetwin.masking import Masks, count_pruned_nonzero
from sparsetwin.methods import STORED, Method, SparseState
from sparsetwin.schedules import Phase, Schedule

VERSION = 1
_KEYS = ("method", "targets", "steps", "phase", "masks", "buffers")


@dataclass(frozen=True)
class LoadedState:
    """Saved state that was found to fit."""

    steps: int
    phase: Phase | None
    masks: Masks
    buffers: dict[str, dict[str, Tensor]]
    learned: Mapping[str, Tensor]
    generator_state: Tensor | None


def dump_state(method: Method, state: SparseState, *, phase: Phase | None) -> dict[str, Any]:
    """Return the state as ints, floats, strings and tensors in dicts and lists."""
    dumped: dict[str, Any] = {
        "version": VERSION,
        "method": method.config(),
        "targets": {name: list(weight.shape) for name, weight in state.weights.items()},
        "steps": state.steps,
        "phase": -1 if phase is None else phase.index,
        "masks": dict(state.masks),
        "buffers": {what: dict(tensors) for what, tensors in state.buffers.items()},
    }
    if state.learned:
        dumped["learned"] = {name: value.detach() for name, value in state.learned.items()}
    if method.draws:
        dumped["rng"] = state.generator.get_state()
    return dumped


def read_state(
    state: Mapping[str, Any], method: Method, weights: Mapping[str, Tensor], *, of: SparseState
) -> LoadedState:
    """Check saved state against a method, the weights it is to be loaded for, and the state that it is to replace.

    Raises:
        StateError: Naming the first thing that does not fit.
    """
    _check_keys(state, method)
    _check_equal(state["method"], method.config(), owner="this method")
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    _check_equal(state["targets"], shapes, owner="this model", prefix="target ")
    phase = _phase(state["phase"], state["steps"], method.schedule)
    masks = _masks(state["masks"], weights, phase)
    stores = method.stores_weights or state["steps"] > method.first_quantized
    if stores and masks.keys() != state["buffers"].get(STORED, {}).keys():
        raise StateError(f"the saved state has masks of {len(masks)} targets and stored weights of others; was it cut?")
    return LoadedState(
        state["steps"],
        phase,
        masks,
        {what: _fitted(what, tensors, {**weights, **of.tensors}) for what, tensors in state["buffers"].items()},
        _learned(state.get("learned", {}), of.learned),
        state["rng"].cpu() if method.draws else None,
    )


def cut_like(weight: Tensor, whole: Tensor) -> Tensor:
    """Return a whole tensor cut as a weight of its shape is; of a weight that is not sharded, the tensor itself.

    Args:
        weight: Gives device and sharding.
        whole: The same in all processes; what is sharded already, or of another shape, is returned as it is.
    """
    if not is_sharded(weight) or is_sharded(whole) or whole.shape != weight.shape:
        return whole
    from sparsetwin._sharding import global_indices, like  # loads torch.distributed.tensor

    part = whole.reshape(-1)[global_indices(weight).to(whole.device)]
    return like(weight, part.to(local(weight).device))


def _check_keys(state: Mapping[str, Any], method: Method) -> None:
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("this is no sparsifier state; expected what Sparsifier.state_dict() returned")
    if state["version"] != VERSION:
        raise StateError(f"sparsifier state of version {state['version']!r}; this release reads version {VERSION}")
    missing = [key for key in (*_KEYS, *(["rng"] if method.draws else [])) if key not in state]
    if missing:
        raise StateError(f"the sparsifier state lacks {', '.join(missing)}; was it cut?")


def _check_equal(saved: Mapping[str, Any], current: Mapping[str, Any], *, owner: str, prefix: str = "") -> None:
    """Name the first field that differs, and of a list the first entry."""
    for field in [*current, *(field for field in saved if field not in current)]:
        here, there = saved.get(field, "nothing"), current.get(field, "nothing")
        if here == there:
            continue
        if isinstance(here, list) and isinstance(there, list) and not prefix:
            pairs = enumerate(zip_longest(here, there, fillvalue="nothing"))
            index, (here, there) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            field = f"{field}[{index}]"
        raise StateError(f"the saved state has {prefix}{field} = {here!r}, {owner} has {there!r}")


def _phase(index: int, steps: int, schedule: Schedule) -> Phase | None:
    """Return the phase in force: that of the next step, or at a boundary the one that just ended."""
    if (index, steps) == (-1, 0):
        return None
    if steps >= 0:
        for phase in (schedule.at(steps), schedule.at(max(steps - 1, 0))):
            if phase.index == index:
                return phase
    raise StateError(f"phase {index} at step {steps} is not in this schedule")


def _masks(saved: Mapping[str, Tensor], weights: Mapping[str, Tensor], phase: Phase | None) -> Masks:
    if saved and (phase is None or not phase.is_sparse):
        raise StateError(f"the saved state has masks, but its phase is not sparse: {phase}")
    masks = _fitted("mask", saved, weights, dtype=torch.bool)
    if masks and len(masks) < len(weights):
        missing = [name for name in weights if name not in masks]
        raise StateError(f"the saved masks lack {', '.join(missing[:3])}")
    alive = count_pruned_nonzero(weights, masks)
    if alive:
        name, count = next(iter(alive.items()))
        raise StateError(
            f"{count} pruned weights of {name} are not zero; load the model, then the optimizer, then the sparsifier"
        )
    return masks


def _learned(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    shapes, expected = ({name: tuple(value.shape) for name, value in of.items()} for of in (saved, current))
    if shapes != expected:
        raise StateError(
            f"the saved state has learned {shapes or 'nothing'}, the method learns {expected or 'nothing'}"
        )
    return saved


def _fitted(
    what: str, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copy saved tensors to the devices, memory formats and shards of the weights, in the order of the weights."""
    for name, tensor in saved.items():
        if name not in weights:
            raise StateError(f"the saved state has a {what} for {name}, which is no target of this model")
        if tensor.shape != weights[name].shape and (dtype is not None or not _spans(tensor, weights[name])):
            raise StateError(
                f"the saved {what} of {name} has shape {tuple(tensor.shape)}, the weight {tuple(weights[name].shape)}"
            )
        if dtype is not None and tensor.dtype != dtype:
            raise StateError(f"the saved {what} of {name} has dtype {tensor.dtype}, expected {dtype}")
    return {name: _placed(saved[name], weight) for name, weight in weights.items() if name in saved}


def _spans(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor has the weight's dimensions, some of them 1: a value for each output, or one for the layer."""
    if tensor.ndim != weight.ndim:
        return False
    return all(one in (1, size) for one, size in zip(tensor.shape, weight.shape, strict=True))


def _placed(tensor: Tensor, weight: Tensor) -> Tensor:
    tensor = cut_like(weight, tensor)
    if tensor.shape != weight.shape:
        return tensor.to(weight.device, copy=True)
    return torch.empty_like(weight, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
