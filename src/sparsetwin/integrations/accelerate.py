"""Accelerate: attach after ``accelerator.prepare``, save and load with ``save_state`` and ``load_state``.

::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    sparsifier = prepare(accelerator, st.ACDC(schedule=schedule), model, optimizer)
    for x, y in loader:
        with accelerator.accumulate(model):
            sparsifier.begin_step()                     # before each forward pass; once a step is enough
            accelerator.backward(loss_fn(model(x), y))
            if accelerator.sync_gradients:
                clip_grad_norm_(accelerator, sparsifier, model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

Real updates count: accumulated micro-batches and updates that a GradScaler skipped are no steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sparsetwin.checkpoint import JSON, Member, Pair
from sparsetwin.errors import UsageError
from sparsetwin.integrations._gathered import WholeState, gathered, refuse_left_out_sharding
from sparsetwin.methods import Method
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets

_REFUSED = {
    "DEEPSPEED": (
        "DeepSpeed flattens parameters, so that no mask fits them; use "
        "Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)), which shards them as they are, or DDP"
    ),
    "MEGATRON_LM": "Megatron-LM splits layers over processes in its own way; use FSDP2 or DDP",
}


def prepare(
    accelerator: Accelerator,
    method: Method,
    model: nn.Module,
    optimizer: Any,
    *,
    targets: Targets | None = None,
    seed: int = 0,
) -> Sparsifier:
    """Attach a method to a prepared model and optimizer, and register its state for ``save_state`` and ``load_state``.

    ``load_state`` loads registered objects after models and optimizers, which is the order that masks need. A folder
    that was saved without a sparsifier is refused by Accelerate, which counts the objects.

    Args:
        accelerator: What prepared them.
        method: What to do; its schedule counts optimizer steps.
        model: As ``accelerator.prepare`` returned it.
        optimizer: One, or a sequence, as ``accelerator.prepare`` returned them; the steps of the last are counted.
        targets: Which parameters may be pruned; by default as `Targets` says.
        seed: For methods that draw.

    Raises:
        UsageError: If an optimizer is not prepared yet, or for distributed engines that cannot be served.
    """
    _refuse_unsupported(accelerator)
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for given in optimizers:
        if not isinstance(given, AcceleratedOptimizer):
            raise UsageError(
                f"{type(given).__name__} is not prepared; call accelerator.prepare(model, optimizer, ...) first and "
                "pass what it returns"
            )
    refuse_left_out_sharding(model, asked=False)
    sparsifier = Sparsifier(method, model, optimizers, targets=targets, seed=seed)
    accelerator.register_for_checkpointing(WholeState(sparsifier))
    return sparsifier


def save_half(
    accelerator: Accelerator,
    pair: Pair,
    model: nn.Module,
    sparsifier: Sparsifier,
    *,
    name: str | None = None,
    metrics: Mapping[str, JSON] | None = None,
) -> Member | None:
    """Save a half of the pair from the main process; every process calls this, since sharded weights are gathered.

    Args:
        accelerator: What prepared the model.
        pair: Where to.
        model: As ``accelerator.prepare`` returned it.
        sparsifier: Attached to it.
        name: As `Pair.save` has it: ``sparse`` if masks are in force and ``dense`` if not.
        metrics: Plain data to list with the member.

    Returns:
        The member in the main process, None in others.

    Raises:
        StateError, CheckpointError: As `Pair.save` does.
    """
    whole, view = gathered(model, sparsifier, keeps=accelerator.is_main_process)
    return pair.save(whole, view, name=name, metrics=metrics) if accelerator.is_main_process else None


def clip_grad_norm_(
    accelerator: Accelerator, sparsifier: Sparsifier, parameters: Iterable[Tensor], max_norm: float
) -> Tensor | None:
    """Clip by the norm of the kept weights' gradients: ``accelerator.clip_grad_norm_`` after masking.

    Args:
        accelerator: What prepared the model; it unscales the gradients under mixed precision.
        sparsifier: Whose masks count.
        parameters: Whose gradients to clip.
        max_norm: Largest norm.

    Returns:
        The norm before clipping, as Accelerate returns it.
    """
    sparsifier.mask_gradients()
    norm: Tensor | None = accelerator.clip_grad_norm_(parameters, max_norm)
    return norm


def _refuse_unsupported(accelerator: Accelerator) -> None:
    """Refuse by name what cannot be served."""
    kind = DistributedType(accelerator.distributed_type).value
    if kind in _REFUSED:
        raise UsageError(_REFUSED[kind])
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise UsageError(
            "FSDP1 flattens weights into one parameter, whose layers cannot be masked; use "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
