"""How a DTensor is cut and copied over processes: which elements are here, who counts them, how to sum over all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Replicate, _StridedShard

from sparsetwin.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """The processes that hold a model together."""

    mesh: DeviceMesh  # the root mesh, which every process belongs to

    @staticmethod
    def of(weights: Mapping[str, Tensor]) -> "Layout | None":
        """Return the layout of weights, or None if none is a DTensor.

        Raises:
            UsageError: If weights lie on meshes of different roots, or their sums are still pending.
        """
        meshes = {name: weight.device_mesh for name, weight in weights.items() if isinstance(weight, DTensor)}
        if not meshes:
            return None
        roots = {name: mesh._get_root_mesh() for name, mesh in meshes.items()}
        first = next(iter(roots.values()))
        for name, root in roots.items():
            if root != first:
                raise UsageError(f"{name} lies on another device mesh than {next(iter(roots))}; slice one root mesh")
        for name, weight in weights.items():
            placements = weight.placements if isinstance(weight, DTensor) else ()
            if not all(isinstance(p, (Shard, Replicate, _StridedShard)) for p in placements):
                raise UsageError(f"{name} has placements {placements}; a weight is sharded or replicated")
        return Layout(first)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        for dimension in range(self.mesh.ndim):
            dist.all_reduce(tensor, group=self.mesh.get_group(dimension))

    def counts(self, weight: Tensor) -> bool:
        """Whether this process is the one of those with copies of the same elements that counts them."""
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            return False
        if not isinstance(weight, DTensor):
            return not any(coordinate)
        own = weight.device_mesh
        if own.ndim == self.mesh.ndim:
            return all(not c for c, p in zip(coordinate, weight.placements, strict=True) if isinstance(p, Replicate))
        names = own.mesh_dim_names or ()
        placed = dict(zip(names, weight.placements, strict=True))
        return all(
            not place
            for name, place in zip(self.mesh.mesh_dim_names or (), coordinate, strict=True)
            if isinstance(placed.get(name, Replicate()), Replicate)
        )


def global_indices(weight: Tensor) -> Tensor:
    """Return the row-major index in the whole tensor of each local element, in the local tensor's row-major order.

    Args:
        weight: Any tensor; of one that is no DTensor all elements are local.

    Returns:
        (local elements,), int64.
    """
    axes = [_axis(weight, axis) for axis in range(weight.ndim)]
    device = weight.to_local().device if isinstance(weight, DTensor) else weight.device
    index = torch.zeros((), dtype=torch.int64, device=device)
    for axis, size in zip(axes, weight.shape, strict=True):
        index = index.unsqueeze(-1) * size + axis.to(device)
    return index.reshape(-1)


def _axis(weight: Tensor, axis: int) -> Tensor:
    """Return which places of one axis are local."""
    places = torch.arange(weight.shape[axis])
    if not isinstance(weight, DTensor):
        return places
    coordinate = weight.device_mesh.get_coordinate()
    assert coordinate is not None
    cuts = [(d, p) for d, p in enumerate(weight.placements) if isinstance(p, (Shard, _StridedShard)) and p.dim == axis]
    # FSDP after tensor parallelism marks its cut as strided: it is made last, though its mesh dimension comes first
    plain = [d for d, p in cuts if not isinstance(p, _StridedShard)]
    strided = [d for d, p in cuts if isinstance(p, _StridedShard)]
    for dimension in [*plain, *reversed(strided)]:
        parts = torch.chunk(places, weight.device_mesh.size(dimension))
        mine = coordinate[dimension]
        places = parts[mine] if mine < len(parts) else places[:0]
    return places


def like(weight: Tensor, part: Tensor) -> Tensor:
    """Return a tensor that is cut like ``weight`` and whose local part is ``part``.

    Args:
        weight: A tensor, perhaps a DTensor.
        part: (local elements,), flat in the local tensor's row-major order.
    """
    if not isinstance(weight, DTensor):
        return part.reshape(weight.shape)
    held = part.reshape(weight.to_local().shape)
    return DTensor.from_local(
        held,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=_row_major(weight.shape),
    )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
