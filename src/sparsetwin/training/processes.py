"""The processes that train one model together, and the one process that trains alone.

Everything that processes have to do at the same time goes through `Processes`. With a single one it does nothing, so
the loop is written once.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsetwin.errors import ConfigError, SparsetwinError
from sparsetwin.training.environment import choose_device

T = TypeVar("T")


class Batches(Protocol):
    """What has to be known of a split to share it out."""

    @property
    def samples(self) -> int:
        """Samples of one epoch."""

    def __len__(self) -> int:
        """Batches of one epoch."""


_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process's place among those that train one model."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All processes, or None for one alone."""
        return dist.group.WORLD if self.are_many else None

    def device(self, name: str) -> torch.device:
        """Return this process's own device of a kind; see `choose_device`.

        Raises:
            ConfigError: If all processes would share one GPU, or there is none for this one.
        """
        device = choose_device(name)
        if not self.are_many or device.type != "cuda":
            return device
        found = torch.cuda.device_count()
        if device.index is not None or self.local_rank >= found:
            raise ConfigError(
                f"{self.count} processes were asked for device {name!r}, and this machine has {found} GPUs; each "
                "takes one of its own: use --device cuda and at most as many processes a machine as it has GPUs"
            )
        return torch.device("cuda", self.local_rank)

    def check_batches(self, batches: Batches, *, batch_size: int, cuts: int) -> None:
        """Refuse batches of which some process would get nothing.

        Args:
            batches: The training split.
            batch_size: Samples of every batch but perhaps the last.
            cuts: Parts into which each process cuts its part.

        Raises:
            ConfigError: Naming the sizes.
        """
        last = batches.samples - (len(batches) - 1) * batch_size
        if self.are_many and last < self.count * cuts:
            raise ConfigError(
                f"the last batch of an epoch has {last} samples, too few for {self.count} processes of {cuts} parts "
                f"each (--train.accumulation); use another --train.batch-size than {batch_size}, or fewer processes"
            )

    def parts(self, tensor: Tensor, *, cuts: int) -> tuple[Tensor, ...]:
        """Return this process's part of a batch, cut into as many parts for accumulation.

        Args:
            tensor: (batch, ...), the whole batch, the same in all processes.
            cuts: How many; alone it may be fewer for a small batch.
        """
        if not self.are_many:
            return tensor.chunk(cuts)
        return tensor.tensor_split(self.count)[self.rank].tensor_split(cuts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes; the tensor may be changed."""
        if self.are_many:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in some process."""
        if not self.are_many:
            return flag
        counted = torch.tensor(int(flag))
        dist.all_reduce(counted)
        return bool(counted)

    def collect(self, value: T) -> list[T]:
        """Return what each process gave, in the order of their ranks."""
        if not self.are_many:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def of_first(self, make: Callable[[], T]) -> T:
        """Return what a call in the first process returned, in all of them.

        Args:
            make: Called in the first process only; its result is sent as bytes.

        Raises:
            SparsetwinError: In all processes what the call raised in the first.
        """
        if not self.are_many:
            return make()
        sent: list[Any] = [None, None]
        if self.is_first:
            try:
                sent[0] = make()
            except SparsetwinError as error:
                sent[1] = error
        dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
        result, failure = sent
        if failure is not None:
            raise failure
        made: T = result
        return made

    def first_alone(self, make: Callable[[], T]) -> T:
        """Call in the first process and, once that is done, in the others; for what may write files that all read."""
        made: list[T] = []
        self.of_first(lambda: made.append(make()))
        return made[0] if made else make()

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's buffers, such as the running statistics of batch norm."""
        if not self.are_many:
            return
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for buffer in model.buffers():
            by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        for buffers in by_kind.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(flat, src=0)
            for buffer, values in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                buffer.copy_(values.view_as(buffer))


ALONE = Processes()
"""One process."""


def is_of_another(error: RuntimeError) -> bool:
    """Whether the error says that another process has stopped or cannot be reached."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@contextmanager
def joined_processes(device: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started with this one, until all have come to the end.

    Args:
        device: Name of the device to train on.

    Raises:
        ConfigError: If there is no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not all(name in os.environ for name in _LAUNCHED):
        yield ALONE
        return
    rank, local_rank, count = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    processes = Processes(rank=rank, count=count, local_rank=local_rank)
    own = processes.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    yield processes  # after an error nothing is taken down: the others may no longer be there to answer
    dist.barrier()
    dist.destroy_process_group()
