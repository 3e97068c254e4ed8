"""DistributedDataParallel that sends only the gradients of kept weights in sparse phases.

All processes share the masks, so no indices travel: each packs the kept gradients of a bucket, and those of everything
that is no target, into one dense tensor, the packed tensors are averaged, and the result is spread out again. Dense
phases send everything, as DDP does by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from sparsetwin._compat import named_weights
from sparsetwin.errors import UsageError
from sparsetwin.masking import Masks
from sparsetwin.sparsifier import Sparsifier


@dataclass
class PackedGradients:
    """What `pack_gradients` sent."""

    bytes_sent: int = 0  # by this process, payload of all reductions so far
    bytes_dense: int = 0  # what DDP by itself would have sent
    _kept: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)  # parameters of a bucket -> places


def pack_gradients(model: DistributedDataParallel, sparsifier: Sparsifier) -> PackedGradients:
    """Make DDP send the gradients of kept weights only, whenever masks are in force.

    With two processes the averages are those of DDP to the bit. With more, the order in which a backend adds up an
    element may depend on its place in the message, so they may differ by rounding. ``no_sync`` works as before.

    Args:
        model: Before its first backward pass; it takes one communication hook.
        sparsifier: Attached to it.

    Returns:
        Counts of bytes, which go on as the model trains.

    Raises:
        UsageError: If the model is no DistributedDataParallel, or the method chooses weights by dense gradients.
    """
    if not isinstance(model, DistributedDataParallel):
        raise UsageError(f"expected a DistributedDataParallel, got a {type(model).__name__}")
    if sparsifier.method.needs_gradients:
        raise UsageError(f"{type(sparsifier.method).__name__} needs the gradients of pruned weights; leave them dense")
    counts = PackedGradients()
    sparsifier.on_phase(lambda event, phase: counts._kept.clear())
    names = {id(parameter): name for name, parameter in named_weights(model).items()}
    model.register_comm_hook(None, _hook(counts, lambda: sparsifier.masks, names, model.process_group))
    return counts


def _hook(
    counts: PackedGradients, masks: Callable[[], Masks], names: dict[int, str], group: dist.ProcessGroup
) -> Callable[[object, GradBucket], torch.futures.Future[Tensor]]:
    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        counts.bytes_dense += buffer.nbytes
        kept = _kept_places(bucket, masks(), names, counts._kept)
        message = buffer if kept is None else buffer[kept]
        counts.bytes_sent += message.nbytes
        message.div_(group.size())
        future = dist.all_reduce(message, group=group, async_op=True).get_future()

        def spread(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            if kept is not None:
                buffer.zero_()
                buffer[kept] = done.value()[0]
            averaged: Tensor = buffer
            return averaged

        spread_out: torch.futures.Future[Tensor] = future.then(spread)
        return spread_out

    return hook


def _kept_places(
    bucket: GradBucket, masks: Masks, names: dict[int, str], known: dict[tuple[int, ...], Tensor]
) -> Tensor | None:
    """Return where in a bucket's buffer kept gradients lie; None if all do."""
    if not any(names[id(parameter)] in masks for parameter in bucket.parameters()):
        return None
    key = tuple(map(id, bucket.parameters()))  # DDP rearranges its buckets after the first backward pass
    if key not in known:
        known[key] = torch.cat(list(_places(bucket, masks, names)))
    return known[key]


def _places(bucket: GradBucket, masks: Masks, names: dict[int, str]) -> Iterator[Tensor]:
    start = int(bucket.buffer().storage_offset())
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        mask = masks.get(names[id(parameter)])
        first = int(gradient.storage_offset()) - start
        if mask is None:
            yield torch.arange(first, first + gradient.numel(), device=gradient.device)
        else:  # the buffer holds a gradient in its parameter's memory format, whatever bucket.gradients() shows
            laid_out = torch.empty_strided(mask.shape, parameter.stride(), dtype=torch.bool, device=gradient.device)
            kept: Tensor = laid_out.copy_(mask).as_strided((mask.numel(),), (1,)).nonzero().squeeze(1)
            yield kept + first
