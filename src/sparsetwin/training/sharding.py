"""A model in several processes: copied (DDP) or cut into shards (FSDP2), and its state put together and cut again."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparsetwin.errors import ConfigError
from sparsetwin.sparsifier import cut_like, gathered
from sparsetwin.training.processes import Processes
from sparsetwin.training.settings import DistributedSettings, TrainSettings

# buffers are shared once a step, after it; torch 2.13 has a new name for what lets DDP leave them alone
_NAMES = inspect.signature(DistributedDataParallel).parameters
_BUFFERS_STAY: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


def check_distributed(settings: DistributedSettings, train: TrainSettings, *, device: torch.device) -> None:
    """Refuse, before anything is trained, what several processes cannot do together.

    Raises:
        ConfigError: Naming the setting.
    """
    if settings.sync_batch_norm and device.type != "cuda":
        raise ConfigError(
            "torch takes batch-norm statistics over processes on GPUs only; leave out --distributed.sync-batch-norm"
        )
    if not settings.fsdp:
        return
    for asked, flag, instead in (
        (train.ema_decay, "--train.ema-decay", "an average of shards is not kept"),
        (train.precision == "fp16", "--train.precision fp16", "each process would skip other updates; use bf16"),
        (train.channels_last, "--train.channels-last", "FSDP2 shards contiguous weights only"),
    ):
        if asked:
            raise ConfigError(f"{flag} does not go with --fsdp: {instead}; or train without --fsdp")


def wrapped(model: nn.Module, processes: Processes, settings: DistributedSettings, *, deterministic: bool) -> nn.Module:
    """Return what runs the model's forward pass so that gradients are averaged over the processes.

    Args:
        model: The whole model, the same in all processes; with FSDP its parameters are replaced by shards.
        processes: Those that train; for one alone the model is returned as it is.
        settings: Copies or shards.
        deterministic: Whether the order in which gradients are added may not depend on chance.
    """
    if not processes.are_many:
        return model
    if settings.sync_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if settings.fsdp:
        _shard_(model)
        return model
    copies = DistributedDataParallel(model, **_BUFFERS_STAY)
    if deterministic and processes.count > 2:  # of two numbers the sum is the same in any order
        copies.register_comm_hook(None, _average_in_order)
    return copies


def without_averaging(model: nn.Module) -> AbstractContextManager[object]:
    """Return the context in which a backward pass of copies only adds to this process's gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def _shard_(model: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in dict.fromkeys(_blocks(model)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists and sequences: layers or blocks that are gathered one at a time."""
    for child in module.children():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            if any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList):
                yield child
        else:
            yield from _blocks(child)


def _average_in_order(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP wants this very annotation
) -> torch.futures.Future[torch.Tensor]:
    """Average gradients, added in the order of ranks wherever they lie in the bucket.

    DDP sorts its buckets anew after the first step, and an all-reduce adds in an order that depends on the place: a
    resumed run would differ in the last bit.
    """
    own, count = bucket.buffer(), dist.get_world_size()
    padded = nn.functional.pad(own, (0, -own.numel() % count))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)
    first, *others = parts.view(count, -1)
    total = first.clone()
    for part in others:
        total += part
    dist.all_gather_into_tensor(padded, total / count)
    done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[own.device] if own.is_cuda else None)
    done.set_result(padded[: own.numel()])
    return done


# State


def cut(whole: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's shards of whole tensors.

    Args:
        whole: Name -> tensor, the same in all processes.
        like: Name -> tensor of the same shape, whose sharding is wanted.
    """
    return {name: cut_like(like[name], tensor) if name in like else tensor for name, tensor in whole.items()}


def cut_optimizer_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state with everything of a parameter's shape cut as the parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut_state = {
        index: {
            key: cut_like(parameters[index], value)
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for key, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": cut_state}


def whole_twin(template: nn.Module, model: nn.Module) -> nn.Module:
    """Return the whole of a sharded model as a plain one; all processes have to call it and all get it.

    Args:
        template: A deep copy of the model from before it was sharded, on any device; it is not changed.
        model: The model, without a wrapper around it.
    """
    device = next(model.parameters()).device
    twin = copy.deepcopy(template).to(device)
    twin.load_state_dict(gathered(model.state_dict()))
    return twin.train(model.training)
