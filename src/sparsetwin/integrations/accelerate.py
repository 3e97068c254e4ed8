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

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sparsetwin.errors import UsageError
from sparsetwin.methods import Method
from sparsetwin.sparsifier import Sparsifier
from sparsetwin.targets import Targets

_REFUSED = {
    "DEEPSPEED": "DeepSpeed flattens parameters, so that no mask fits them; use DDP",
    "MEGATRON_LM": "Megatron-LM splits layers over processes in its own way; use DDP",
    "FSDP": "accelerator.save_state writes one process's masks only, and FSDP shards them; use DDP",
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
        targets: Which parameters may be pruned; by default every linear and convolution weight.
        seed: For methods that draw.

    Raises:
        UsageError: If an optimizer is not prepared yet, or for distributed engines that cannot be served.
    """
    kind = DistributedType(accelerator.distributed_type).value
    if kind in _REFUSED:
        raise UsageError(_REFUSED[kind])
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for given in optimizers:
        if not isinstance(given, AcceleratedOptimizer):
            raise UsageError(
                f"{type(given).__name__} is not prepared; call accelerator.prepare(model, optimizer, ...) first and "
                "pass what it returns"
            )
    sparsifier = Sparsifier(method, model, optimizers, targets=targets, seed=seed)
    accelerator.register_for_checkpointing(sparsifier)
    return sparsifier


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
