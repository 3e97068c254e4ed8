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
from sparsetwin.methods import Method
from sparsetwin.sparsifier import Sparsifier


@dataclass
class PackedGradients:
    """What `pack_gradients` sent."""

    bytes_sent: int = 0  # by this process, payload of all reductions so far
    bytes_dense: int = 0  # what DDP by itself would have sent
    _packings: dict[tuple[int, ...], "_Packing"] = field(default_factory=dict, repr=False)  # by a bucket's parameters
    _of: Masks = field(default_factory=dict, repr=False)  # the masks that they are of


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
    method = sparsifier.method
    if (
        any(method.needs_gradients(phase) for phase in method.schedule.phases)
        or type(method).gradient_masks is not Method.gradient_masks
    ):
        raise UsageError(f"{type(method).__name__} needs the gradients of pruned weights; leave them dense")
    counts = PackedGradients()
    names = {id(parameter): name for name, parameter in named_weights(model).items()}
    model.register_comm_hook(None, _hook(counts, lambda: sparsifier.masks, names, model.process_group))
    return counts


def _hook(
    counts: PackedGradients, masks: Callable[[], Masks], names: dict[int, str], group: dist.ProcessGroup
) -> Callable[[object, GradBucket], torch.futures.Future[Tensor]]:
    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        counts.bytes_dense += buffer.nbytes
        if masks() is not counts._of:  # some methods change them within a phase
            counts._of = masks()
            counts._packings.clear()
        packing = _packing(bucket, counts._of, names, counts._packings)
        message = buffer if packing is None else packing.pack(buffer)
        counts.bytes_sent += message.nbytes
        message.div_(group.size())
        future = dist.all_reduce(message, group=group, async_op=True).get_future()

        def spread(done: torch.futures.Future[list[Tensor]]) -> Tensor:
            averaged: Tensor = buffer if packing is None else packing.unpack(done.value()[0], buffer)
            return averaged

        spread_out: torch.futures.Future[Tensor] = future.then(spread)
        return spread_out

    return hook


@dataclass(frozen=True)
class _Packing:
    """How a bucket is packed: `index_select` and `index_copy_` are several times faster on a CPU than indexing is."""

    places: Tensor  # (kept,), int64: where kept gradients lie in the bucket's buffer
    message: Tensor  # (kept,), of the buffer's dtype: sent anew in each step

    def pack(self, buffer: Tensor) -> Tensor:
        return torch.index_select(buffer, 0, self.places, out=self.message)

    def unpack(self, message: Tensor, buffer: Tensor) -> Tensor:
        return buffer.zero_().index_copy_(0, self.places, message)


def _packing(
    bucket: GradBucket, masks: Masks, names: dict[int, str], known: dict[tuple[int, ...], _Packing]
) -> _Packing | None:
    """Return how a bucket is packed; None if all of it is kept."""
    if not any(names[id(parameter)] in masks for parameter in bucket.parameters()):
        return None
    key = tuple(map(id, bucket.parameters()))  # DDP rearranges its buckets after the first backward pass
    if key not in known:
        places = torch.cat(list(_places(bucket, masks, names)))
        known[key] = _Packing(places, bucket.buffer().new_empty(places.numel()))
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
