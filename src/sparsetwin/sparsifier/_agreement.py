"""Whether the processes that train one model together still agree, asked when a phase begins.

Two things are compared. Before masks are chosen: step, phase, method and targets of all processes, since a choice from
sharded weights rests on them and would wait for ever if they differed. Afterwards: the masks of all processes that hold
copies of the same weights. Parts of one weight have nothing in common to compare; what cut them is the same by the
first comparison. A comparison sends 16 bytes for each value compared, whatever the size of the weights.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sparsetwin._compat import is_sharded, local
from sparsetwin.errors import AgreementError
from sparsetwin.masking import Masks, pack_mask
from sparsetwin.methods import Method
from sparsetwin.schedules import Phase

Together: TypeAlias = dist.ProcessGroup | DeviceMesh
"""Processes that train copies of one model; those of a mesh along each of its dimensions."""


class Agreement:
    """Compares what the processes of a run have before them. With a single process it does nothing.

    Args:
        model: The model. The group of a ``DistributedDataParallel`` in it and the meshes of its sharded weights are
            found anew each time.
        group: Further processes that hold copies.
    """

    def __init__(self, model: nn.Module, group: Together | None) -> None:
        self._model = model
        self._given = group

    def check_position(self, method: Method, *, steps: int, phase: Phase | None, weights: Mapping[str, Tensor]) -> None:
        """Compare where the processes stand and what they train.

        Raises:
            AgreementError: On every process, naming the first of step, phase, method and targets that differs.
        """
        groups = self._groups(weights)
        if not groups:
            return
        index = -1 if phase is None else phase.index
        targets = [(name, tuple(w.shape), str(w.dtype), str(_placements(w))) for name, w in weights.items()]
        values = [steps, index, _digest(repr(method.config()).encode()), _digest(repr(targets).encode())]
        different = _first_different(values, groups)
        if different is not None:
            told = (
                f"step: this one has done {steps} steps; load the same checkpoint everywhere",
                f"phase: this one enters phase {index} at step {steps}; give all the same schedule",
                f"method: this one has {method.config()}; give all the same",
                f"targets: this one has {len(targets)}, of which the first is {targets[0]}; give all the same model",
            )
            raise AgreementError(f"the processes that train together differ in their {told[different]}")

    def choose(self, enter: Callable[[], Masks], weights: Mapping[str, Tensor], *, phase: Phase, steps: int) -> Masks:
        """Return the masks that a method chooses, once all processes are known to have the same.

        Args:
            enter: Chooses them; if it fails in one process, the others hear of it.
            weights: Canonical name -> weight.
            phase: The phase that begins.
            steps: Optimizer steps done.

        Raises:
            AgreementError: On every process, naming the first target whose masks differ.
        """
        try:
            masks = enter()
        except Exception:
            with suppress(RuntimeError):  # the others may have stopped already
                self._compare([1] + [0] * len(weights), weights)
            raise
        self.check_masks(masks, weights, phase=phase, steps=steps)
        return masks

    def check_masks(self, masks: Masks, weights: Mapping[str, Tensor], *, phase: Phase | None, steps: int) -> None:
        """Compare the masks of processes that hold copies of the same weights.

        Raises:
            AgreementError: On every process, naming the first target whose masks differ.
        """
        if not self._groups(weights):
            return
        digests = [_digest(pack_mask(local(masks[n])).numpy().tobytes()) if n in masks else 0 for n in weights]
        different = self._compare([0, *digests], weights)
        if different == 0:
            raise AgreementError(f"another process failed to choose its masks at step {steps}; see its own message")
        if different is not None:
            place = f"at step {steps}, phase {-1 if phase is None else phase.index}"
            raise AgreementError(
                f"the masks of {list(weights)[different - 1]} are not the same in all processes that hold copies of "
                f"it, {place}; its weights, or what a method draws, have come apart: give all the same initial "
                "weights, seed and averaged gradients"
            )

    def _compare(self, values: Sequence[int], weights: Mapping[str, Tensor]) -> int | None:
        """Compare a value that all have, and one for each weight between processes that hold copies of it."""
        groups = self._groups(weights)
        copied = [[True] + [_is_copied(weight, group.ranks) for weight in weights.values()] for group in groups]
        return _first_different(values, groups, among=copied)

    def _groups(self, weights: Mapping[str, Tensor]) -> list["_Group"]:
        """Return the groups of more than one process that this one belongs to, each set of processes once."""
        if not (dist.is_available() and dist.is_initialized()):
            return []
        found: list[dist.ProcessGroup] = []
        if isinstance(self._given, DeviceMesh):
            found += _dimensions(self._given)
        elif self._given is not None:
            found.append(self._given)
        for module in self._model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                found.append(module.process_group)
        roots: list[DeviceMesh] = []
        for weight in weights.values():
            root = _mesh(weight)._get_root_mesh() if is_sharded(weight) else None
            if root is not None and root not in roots:
                roots.append(root)
                found += _dimensions(root)
        mine = [group for group in found if dist.get_rank(group) >= 0 and dist.get_world_size(group) > 1]
        by_ranks = {frozenset(dist.get_process_group_ranks(group)): group for group in reversed(mine)}
        return [_Group(group, ranks) for ranks, group in reversed(by_ranks.items())]


@dataclass(frozen=True)
class _Group:
    processes: dist.ProcessGroup
    ranks: frozenset[int]

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over the group's processes."""
        on_cpu = "cpu:" in dist.get_backend_config(self.processes)
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        sent = torch.tensor(values, dtype=torch.int64, device=device)
        dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self.processes)
        largest: list[int] = sent.tolist()
        return largest


def _first_different(
    values: Sequence[int], groups: Sequence[_Group], *, among: Sequence[Sequence[bool]] | None = None
) -> int | None:
    """Return the place of the first value that differs within some group; all processes get the same answer.

    Args:
        values: Of this process, as many as all others have.
        groups: The groups that it belongs to.
        among: For each group, which values its processes have in common; by default all.
    """
    none = first = len(values)
    for place, group in enumerate(groups):
        taken = [value if among is None or among[place][i] else 0 for i, value in enumerate(values)]
        largest = group.largest([*taken, *(-value for value in taken)])
        differs = (i for i in range(none) if largest[i] != -largest[none + i])
        first = min(first, next(differs, none))
    for group in groups if len(groups) > 1 else ():  # the processes of a difference tell those that do not see it
        first = -group.largest([-first])[0]
    return first if first < none else None


def _dimensions(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)] if mesh.get_coordinate() is not None else []


def _mesh(weight: Any) -> DeviceMesh:
    mesh: DeviceMesh = weight.device_mesh
    return mesh


def _placements(weight: Any) -> tuple[Any, ...]:
    """Return how a weight lies on each dimension of its mesh."""
    return tuple(weight.placements) if is_sharded(weight) else ()


def _is_copied(weight: Tensor, ranks: Iterable[int]) -> bool:
    """Whether these processes hold copies of a weight, not parts of it."""
    for dimension, placement in enumerate(_placements(weight)):
        cut = dist.get_process_group_ranks(_mesh(weight).get_group(dimension))
        if not placement.is_replicate() and len(set(cut).intersection(ranks)) > 1:
            return False
    return True


def _digest(content: bytes) -> int:
    """Return 63 bits that stand for the content; they can be negated."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
