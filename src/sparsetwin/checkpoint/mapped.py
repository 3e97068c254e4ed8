"""A sparse file that stays on the disk: mapped into memory, and decoded one tensor at a time."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsetwin.checkpoint._assign import assign, check_loaded, paths_of
from sparsetwin.checkpoint._encoding import decode, decode_mask, decode_one
from sparsetwin.checkpoint._layout import parse, part_names
from sparsetwin.checkpoint._model_state import bare, check_matches, state_of
from sparsetwin.checkpoint._plain import JSON
from sparsetwin.checkpoint._safetensors import Reader, count, naming
from sparsetwin.errors import CheckpointError, UsageError, nearest


class SparseFile:
    """A file of `save_sparse` or `save_dense`, mapped: opening it reads the header only.

    Bits, values and scales are views of the mapped file, which processes on one machine share; a dense tensor exists
    only while the caller holds it. Each part is checked against its checksum when it is first read. The mapping holds
    on to the file, also when another is put in its place; a file that is cut short in place while it is mapped ends
    the process, as everywhere.

    Open it with `SparseFile.open`, close it with `close` or a ``with`` block; views live on afterwards.
    """

    def __init__(self, path: Path, reader: Reader, stack: ExitStack) -> None:
        self.path = path
        self._contents = parse(reader)
        self._open: Reader | None = reader
        self._stack = stack
        groups = self._contents.groups()
        self._owner = {name: owner for owner, group in groups.items() for name in group}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map a file.

        Raises:
            CheckpointError: If it is missing, truncated, corrupted, foreign or of an unknown version.
        """
        path = Path(path)
        with naming(path), ExitStack() as stack:
            reader = Reader.own(path, stack.enter_context(safe_open(path, framework="pt", device="cpu")))
            found = cls(path, reader, stack)
            found._stack = stack.pop_all()
            return found

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, as in the model's ``state_dict``, sorted but for tied ones: they come together."""
        return tuple(self._owner)

    @property
    def sparse_names(self) -> tuple[str, ...]:
        """Names of the tensors that are stored as bits and values, tied names included."""
        return tuple(name for name, owner in self._owner.items() if owner in self._contents.sparse)

    @property
    def card(self) -> dict[str, JSON]:
        """The plain data that were saved with the network."""
        return copy.deepcopy(self._contents.card)

    def owner(self, name: str) -> str:
        """Return the name under which a tensor is stored; two names with one owner are one tensor."""
        if name not in self._owner:
            raise CheckpointError(f"{self.path} has no tensor {name!r}{nearest(name, self._owner)}")
        return self._owner[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a dense tensor."""
        owner = self.owner(name)
        sparse = self._contents.sparse
        return sparse[owner].shape if owner in sparse else self._reader.layout(owner)[1]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor was saved from."""
        owner = self.owner(name)
        sparse = self._contents.sparse
        return sparse[owner].dtype if owner in sparse else self._reader.layout(owner)[0]

    def encoding(self, name: str) -> str:
        """Return how a tensor is stored: ``dense``, ``bitmask``, ``bitmask-int8`` and so on."""
        owner = self.owner(name)
        return self._contents.sparse[owner].encoding if owner in self._contents.sparse else "dense"

    def kept(self, name: str) -> int:
        """Return how many elements a tensor keeps; all of them if it is stored dense."""
        owner = self.owner(name)
        if owner not in self._contents.sparse:
            return count(self.shape(owner))
        return count(self._reader.layout(part_names(owner)[1])[1])

    def mask_bits(self, name: str) -> Tensor:
        """Return a sparse tensor's mask as it lies in the file.

        Returns:
            (ceil(numel / 8),), uint8, one bit a weight, row-major, the lowest bit first; do not write to it.

        Raises:
            CheckpointError: If the tensor is stored dense, or damaged.
        """
        return self._part(name, 0)

    def values(self, name: str) -> Tensor:
        """Return a sparse tensor's kept values as they lie in the file.

        Returns:
            (kept,), row-major, in the dtype of the encoding; do not write to it.

        Raises:
            CheckpointError: If the tensor is stored dense, or damaged.
        """
        return self._part(name, 1)

    def scales(self, name: str) -> Tensor | None:
        """Return the float32 scales of an int8 tensor, one a slice along its first axis, or None for other encodings.

        Raises:
            CheckpointError: If the tensor is stored dense, or damaged.
        """
        has_scales = self._sparse_owner(name) and self._contents.sparse[self.owner(name)].has_scales
        return self._part(name, 2) if has_scales else None

    def mask(self, name: str) -> Tensor:
        """Return a sparse tensor's mask, bool, of its shape, True keeps.

        Raises:
            CheckpointError: If the tensor is stored dense, or damaged.
        """
        owner = self._sparse_owner(name)
        with naming(self.path):
            return decode_mask(self._reader, self._contents, owner)

    def dense(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in dense form, in memory of its own; nothing of it is kept here.

        Args:
            name: One of `names`.
            dtype: What a floating-point tensor is converted to; by default the dtype that it was saved from.

        Raises:
            CheckpointError: If there is no such tensor, or it is damaged.
        """
        owner = self.owner(name)
        with naming(self.path):
            return decode_one(self._reader, self._contents, owner, dtype=dtype)

    def items(self, *, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every name with its dense tensor; only the one that the caller holds exists.

        Args:
            dtype: As for `dense`.
        """
        tensors = decode(self._reader, self._contents, {}, dtype=dtype)
        while True:
            with naming(self.path):
                item = next(tensors, None)
            if item is None:
                return
            yield item
            del item

    def check_fits(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Refuse a model that `load_into` would refuse.

        Args:
            model: As for `load_into`.
            dtype: As for `load_into`.

        Raises:
            StateError: As `load_into` does.
        """
        inner = bare(model)
        state = state_of(inner)
        given = {name: (self.shape(name), _converted(self.dtype(name), dtype)) for name in self.names}
        ignored = {name for name, tensor in state.items() if dtype is not None and tensor.is_meta}
        check_matches(state, given, what=str(self.path), ignoring_dtype=ignored)
        check_loaded(inner, what=str(self.path))

    def load_into(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        views: bool = False,
        sparse: Callable[[str], Tensor] | None = None,
    ) -> nn.Module:
        """Give a model its parameters and buffers, one after the other, so that no second copy is held.

        Parameters and buffers on the meta device are replaced by tensors on the CPU, tied ones by one tensor; others
        keep their place and get the values.

        Args:
            model: Of the network's architecture, such as one built under ``torch.device("meta")``; wrapped or not.
            dtype: What floating-point tensors are converted to; the model's on the meta device become so too.
            views: Whether what is stored dense stays where it is in the mapped file, if it needs no conversion; the
                model must not be trained then.
            sparse: What returns the tensor for a name that is stored sparse; it is decoded by default.

        Returns:
            The model.

        Raises:
            CheckpointError: If the file is damaged; the model may then be partly filled.
            StateError: If names, shapes or dtypes differ, or a buffer that no file holds is on the meta device.
        """
        self.check_fits(model, dtype=dtype)
        inner = bare(model)
        paths = paths_of(inner)
        made: Tensor | None = None  # of the owner before; what is tied in the file comes together
        before = ""
        for name, owner in self._owner.items():
            if made is None or owner != before:  # tied in the file and not in the model: two tensors
                made = None  # before the next one is made
                made = self._made(owner, dtype, views, sparse)
            before = owner
            if assign(inner, paths[name], made):
                made = None
        return model

    def _made(
        self, owner: str, dtype: torch.dtype | None, views: bool, sparse: Callable[[str], Tensor] | None
    ) -> Tensor:
        if owner in self._contents.sparse:
            return self.dense(owner, dtype=dtype) if sparse is None else sparse(owner)
        if not views:
            return self.dense(owner, dtype=dtype)
        with naming(self.path):
            tensor = self._reader.map(owner)
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    def close(self) -> None:
        """Close the file; views that were handed out stay."""
        self._open = None
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _reader(self) -> Reader:
        if self._open is None:
            raise UsageError(f"{self.path} was closed; open it again with SparseFile.open")
        return self._open

    def _sparse_owner(self, name: str) -> str:
        owner = self.owner(name)
        if owner not in self._contents.sparse:
            raise CheckpointError(f"{self.path} stores {name} dense, without bits and values; read it with dense()")
        return owner

    def _part(self, name: str, index: int) -> Tensor:
        owner = self._sparse_owner(name)
        with naming(self.path):
            return self._reader.map(part_names(owner)[index])


def _converted(dtype: torch.dtype, wished: torch.dtype | None) -> torch.dtype:
    return wished if wished is not None and dtype.is_floating_point else dtype
