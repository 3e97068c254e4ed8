"""Batch-norm statistics made anew for the weights as they are now.

Running statistics trail behind the weights, the more so after a switch between dense and sparse. A pass over some
training batches gives a network the statistics of its own weights, without changing one of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from sparsetwin.errors import UsageError

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A model's input; a tuple or list that begins with it, as data loaders give; or keyword arguments."""


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Batch], *, limit: int | None = None) -> int:
    """Replace the running statistics of every batch-norm layer by their mean over batches.

    The mean is cumulative, as with ``momentum=None``: the statistics of every batch count the same, also those of a
    smaller last one, and none decays. The variance is the mean of the batches' unbiased variances, as torch's own.
    Batch-norm layers alone are in training mode meanwhile; dropout is off, so the result depends on nothing random.
    Layers that keep no statistics, or that the forward pass does not reach, stay as they are. Under data parallelism
    give the bare module: each process averages the batches that it is given.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> recalibrate_batch_norm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
    2
    >>> model[0].running_mean, model[0].running_var
    (tensor([4.5000]), tensor([5.]))

    Args:
        model: Any module; its weights, momentum values and training flags are the same afterwards.
        batches: Tensors go in as they are, of a tuple or list the first element, a mapping as keyword arguments.
            Tensors are moved to the device of the first batch-norm layer.
        limit: Use this many batches at most; by default all.

    Returns:
        Batches used; 0 without looking at them if no layer keeps statistics.

    Raises:
        UsageError: If there is no batch, one is of another type, ``limit`` is less than 1, or a lazy layer has no
            statistics yet. After this or any other error the old statistics are back.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is a number of batches, at least 1, or None for all of them; got {limit}")
    layers = _layers_with_statistics(model)
    if not layers:
        return 0
    device = layers[0].running_mean.device  # type: ignore[union-attr]  # it keeps statistics
    used = 0
    with _averaging(model, layers):
        for batch in islice(batches, limit):
            _forward(model, batch, device)
            used += 1
        if not used:
            raise UsageError("batch-norm statistics need at least one batch, got none; is the data loader used up?")
    return used


def _layers_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch-norm layers that keep running statistics, SyncBatchNorm included."""
    layers: list[_BatchNorm] = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            if is_lazy(module.running_mean):
                raise UsageError(f"the lazy batch-norm layer {name!r} has no statistics yet; run the model once before")
            layers.append(module)
    return layers


@contextmanager
def _averaging(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let the layers average cumulatively from nothing; put flags and momentum back, after an error statistics too."""
    flags = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    old = [_statistics(layer) for layer in layers]
    copies = [[tensor.clone() for tensor in tensors] for tensors in old]
    reached = [False] * len(layers)
    try:
        for module in flags:  # the attribute itself: overridden train() methods, such as one that merges adapters, rest
            module.training = False
        for layer in layers:
            layer.training, layer.momentum = True, None
            layer.reset_running_stats()
        yield
        reached = [bool(layer.num_batches_tracked) for layer in layers]
    finally:
        for module, flag in flags.items():
            module.training = flag
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for kept, tensors, values in zip(reached, old, copies, strict=True):
            for tensor, value in zip(tensors, values, strict=True):
                if not kept:
                    tensor.copy_(value)


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [buffer for buffer in buffers if buffer is not None]


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        model(**{key: _to(value, device) for key, value in batch.items()})
    elif isinstance(batch, Tensor):
        model(_to(batch, device))
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        model(_to(batch[0], device))
    else:
        raise UsageError(
            f"a batch is a tensor, a tuple or list that begins with one, or a mapping of keyword arguments; got "
            f"{type(batch).__name__}"
        )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
