"""What trainers save from one process, of models that are sharded over several: whole tensors, cut again on loading."""

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sparsetwin._compat import canonical_name, is_sharded
from sparsetwin.errors import UsageError
from sparsetwin.masking import SparseView
from sparsetwin.sparsifier import Sparsifier, WholeView


class WholeState:
    """A `Sparsifier`'s state with whole tensors, which one process can save and any number of them load.

    Args:
        sparsifier: Whose state; without DTensors it is the sparsifier's own.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier

    def state_dict(self) -> dict[str, Any]:
        """Return the state; every process of a sharded model has to call this."""
        state = self._sparsifier.state_dict()
        buffers = {what: _whole_tensors(tensors) for what, tensors in state["buffers"].items()}
        return {**state, "masks": _whole_tensors(state["masks"]), "buffers": buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state in every process; `Sparsifier.load_state_dict` cuts it as the model is."""
        self._sparsifier.load_state_dict(state)


class WholeModel(nn.Module):
    """A model's gathered tensors where a model is expected; it has a ``state_dict`` and nothing else.

    Args:
        tensors: Canonical name -> tensor.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the tensors."""
        return self._tensors


def is_sharded_model(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def group_of_copies(model: nn.Module) -> dist.ProcessGroup | None:
    """Return the processes that train copies of a model whose DDP wrapper is out of sight: all, as trainers wrap it.

    Args:
        model: Sharded weights show their processes themselves.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or is_sharded_model(model):
        return None
    return dist.group.WORLD


def refuse_left_out_sharding(model: nn.Module, *, asked: bool) -> None:
    """Refuse a model that is whole although Accelerate was asked to shard it.

    Accelerate takes its FSDP plugin in runs on several accelerators only; on CPUs, and in one process without a
    launcher, it leaves the plugin out without a word, and trains whole copies.

    Args:
        model: As it is to train.
        asked: The trainer's arguments ask for FSDP; Accelerate's own plugin and launcher are noticed here.

    Raises:
        UsageError: Saying what to do instead.
    """
    asked = asked or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and not is_sharded_model(model) and not any(map(_is_fsdp1, model.modules())):  # it has its own message
        raise UsageError(
            "FSDP was asked for, but the weights are whole: Accelerate leaves FSDP out on CPUs, and in one process "
            "that no launcher started, without saying so; start the run on accelerators with accelerate launch or "
            "torchrun, or leave out the fsdp arguments (and ACCELERATE_USE_FSDP) to train with DDP, or shard with "
            "torch.distributed.fsdp.fully_shard in a loop of your own"
        )


def _is_fsdp1(module: nn.Module) -> bool:
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def gathered(model: nn.Module, sparsifier: Sparsifier, *, keeps: bool) -> tuple[nn.Module, SparseView]:
    """Return a model and its sparsifier as `Pair.save` takes them, whole and on the CPU if they are sharded.

    Args:
        model: Every process of a sharded one has to call this.
        sparsifier: Attached to it.
        keeps: This process needs the result; others hold one whole tensor at a time, and get empty ones.
    """
    if not is_sharded_model(model):
        return model, sparsifier
    state = model.state_dict(keep_vars=True)  # tied weights are one object here
    found: dict[int, Tensor] = {}
    for tensor in state.values():
        if isinstance(tensor, Tensor) and id(tensor) not in found:
            whole = _whole(tensor)
            found[id(tensor)] = whole if keeps else whole.new_empty(0)
    tensors = {canonical_name(name, model): found.get(id(tensor), tensor) for name, tensor in state.items()}
    masks = _whole_tensors(sparsifier.masks)
    return WholeModel(tensors), WholeView(sparsifier.phase, sparsifier.steps, masks, sparsifier.target_names)


def _whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _whole(tensor) if is_sharded(tensor) else tensor for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor.detach() if gather is None else gather().detach()
    return whole.cpu()
