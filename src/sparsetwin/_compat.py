"""The only file that knows wrappers' name prefixes and torch versions; with `_sharding`, what a DTensor is."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PREFIXES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # no model's own child is called so
_HOLDERS = ("DistributedDataParallel", "DataParallel", "AveragedModel")  # classes that call their model ``module``
_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:module|{'|'.join(_PREFIXES)})\.")


def canonical_name(name: str, model: nn.Module) -> str:
    """Return a parameter's name as the bare model has it, without what wrappers put in front.

    DDP and DataParallel put ``module.`` in front, ``torch.compile`` ``_orig_mod.``, activation checkpointing and FSDP1
    prefixes of their own. A prefix is dropped only where the module that owns it is such a wrapper, so a model whose
    own child is called ``module`` keeps it.
    """
    if not _WRAPPERS.search(name):
        return name
    kept: list[str] = []
    owner: nn.Module | None = model
    for part in name.split("."):
        if not (owner is not None and _is_wrapper(owner, part)):
            kept.append(part)
        owner = getattr(owner, part, None) if owner is not None else None
        owner = owner if isinstance(owner, nn.Module) else None
    return ".".join(kept)


def _is_wrapper(owner: nn.Module, child: str) -> bool:
    if child == "module":
        return any(base.__name__ in _HOLDERS for base in type(owner).__mro__)
    return child in _PREFIXES


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter once, under its canonical name, in the model's own order."""
    return {canonical_name(name, model): parameter for name, parameter in model.named_parameters()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, under its canonical name, in the model's own order."""
    buffers = {canonical_name(name, model): buffer for name, buffer in model.named_buffers()}
    return {**named_weights(model), **buffers}


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process: a DTensor's shard, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; it is asked without loading what DTensors need."""
    return hasattr(tensor, "to_local")


def total(count: Tensor) -> int:
    """Return a count as a number; of a DTensor the sum over all processes, each of which has to call this."""
    gather = getattr(count, "full_tensor", None)  # a DTensor's own item() is this process's part only
    return int(count if gather is None else gather())


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether every element is finite; of DTensors in all processes, each of which has to call this."""
    found: dict[torch.device, list[Tensor]] = {}
    sharded: list[Tensor] = []
    for tensor in tensors:
        if is_sharded(tensor):
            sharded.append(tensor)
        else:
            found.setdefault(tensor.device, []).append(tensor.isfinite().all())
    counts = [total(tensor.isfinite().logical_not().sum()) for tensor in sharded]  # each process has part in each sum
    return not any(counts) and all(bool(torch.stack(each).all()) for each in found.values())


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be counted or read back."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
