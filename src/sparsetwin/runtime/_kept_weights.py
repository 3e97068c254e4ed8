"""Stand-ins for weights that are kept in a file: of their shape, in memory that nobody touches, so that it is none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsetwin.kernels import KeptWeight
from sparsetwin.runtime._graph import Layer, without_weight


class KeptWeights:
    """Knows what each stand-in, or a view of it, stands for. Stand-ins must outlive what asks about them."""

    def __init__(self) -> None:
        self._by_memory: dict[int, KeptWeight] = {}
        self._alive: list[Tensor] = []

    def stand_in(self, weight: KeptWeight) -> Tensor:
        """Return a float32 tensor of a weight's shape, its numbers never written."""
        tensor = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        self._by_memory[tensor.untyped_storage().data_ptr()] = weight
        self._alive.append(tensor)
        return tensor

    def __bool__(self) -> bool:
        """Tell whether there is any stand-in."""
        return bool(self._alive)

    def stands_in(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a stand-in or a view of one."""
        return self._found(tensor) is not None

    def layer(self, operation: Layer) -> Layer:
        """Return a layer with what its weight stands for; views, such as transposed weights, are kept anew."""
        found, weight = self._found(operation.weight), operation.weight
        if found is None:
            return operation
        if tuple(weight.shape) != found.shape or not weight.is_contiguous() or weight.storage_offset():
            found = KeptWeight.from_dense(self.real(weight))
        return without_weight(operation, found)

    def real(self, arguments: Any) -> Any:
        """Return arguments with the numbers of every weight among them, dense."""
        if isinstance(arguments, Tensor):
            found = self._found(arguments)
            if found is None:
                return arguments
            return found.dense().as_strided(arguments.shape, arguments.stride(), arguments.storage_offset())
        if isinstance(arguments, (tuple, list)):
            return type(arguments)(self.real(part) for part in arguments)
        if isinstance(arguments, Mapping):
            return {name: self.real(part) for name, part in arguments.items()}
        return arguments

    def _found(self, tensor: Tensor) -> KeptWeight | None:
        return self._by_memory.get(tensor.untyped_storage().data_ptr()) if self._by_memory else None
