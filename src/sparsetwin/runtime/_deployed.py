"""The network that `deploy` returns."""

import inspect
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

from torch import nn

from sparsetwin.errors import SparsityWarning, UsageError
from sparsetwin.runtime._calls import Call, Caller, is_finite, plain_mode, quick_key
from sparsetwin.runtime._entries import Entry
from sparsetwin.runtime._file import save_entries
from sparsetwin.runtime._plan import Plan
from sparsetwin.runtime._rivals import Runner
from sparsetwin.runtime._sizes import Axes

SHAPES = 8  # that are planned when they are first called with; further ones run layer by layer
_LOCK = threading.RLock()  # planning is for one thread at a time
if hasattr(os, "register_at_fork"):  # a fork waits for it, so that no child inherits it held
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


class Source(Protocol):
    """Where plans come from: a model, or a file."""

    @property
    def name(self) -> str:
        """The model's class."""

    @property
    def signature(self) -> inspect.Signature:
        """How it is called."""

    @property
    def threads(self) -> int:
        """Of the kernels."""

    def entry(self, call: Call, like: Entry | None = None) -> Entry:
        """Plan a call."""

    def reference(self, call: Call) -> Any:
        """Compute a call densely, in float32."""

    def without_plan(self, call: Call) -> Runner | None:
        """Return what runs calls like this one without a plan, if there is such a thing."""

    def swapped(self) -> nn.Module:
        """Return the model with sparse linears in place."""

    def free_axes(self, entry: Entry) -> Axes | None:
        """Return for each leaf of a call the axes whose sizes no operation depends on; None if that is not known."""


class Deployed(nn.Module):
    """A network ready to run: called as the model that it was made from, by the fastest engine measured.

    Calls may run at once. It has no parameters, no gradients and no training mode, cannot be pickled (`save` and `load`
    instead), and a deep copy shares everything but its warnings. A call with new shapes is planned when it comes, with
    the choices of the first plan; after eight shapes, further ones run layer by layer, without a plan of their own.
    Results that are not finite are computed again by the original network, with one warning.
    """

    def __init__(self, source: Source, entries: Sequence[Entry]) -> None:
        super().__init__()
        self.training = False
        self._source = _Hidden(source)
        self._caller = Caller(source.signature)
        self._first = entries[0]
        self._quick: dict[Any, Entry] = {}  # by `quick_key`: entries that were found before
        self._entries: dict[Any, Entry] = {entry.call.key: entry for entry in entries if entry.call.key is not None}
        self._warned = False

    @property
    def plan(self) -> Plan:
        """The plan of the example's shape."""
        return self._first.plan

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of all shapes so far."""
        return tuple(entry.plan for entry in self.plans_by_shape)

    @property
    def layers(self) -> nn.Module:
        """The original network with sparse linears in place: of its class, with all its methods, for any control flow.

        ``deployed.layers.generate(...)`` works if the model has such a method.
        """
        return self._source.value.swapped()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Do what the model does."""
        key = None if named else quick_key(arguments)
        entry = self._quick.get(key)
        if entry is not None:
            call = Call(arguments, named, arguments, entry.call.key)
        else:
            call = self._caller.call(arguments, named)
        with plain_mode():
            if entry is None:
                entry = self._found(call)
                if key is not None and call.key in self._entries:
                    self._quick[key] = entry
            result = entry.run(call)
            if is_finite(result):
                return result
            return self._again(call)

    def _found(self, call: Call) -> Entry:
        """Return what runs a call, planned now if it is the first of its kind."""
        found = self._entries.get(call.key) if call.key is not None else None
        return self._prepare(call) if found is None else found

    def prepare(self, *arguments: Any, **named: Any) -> Plan:
        """Plan calls of these shapes ahead of the first; return the plan."""
        call = self._caller.call(arguments, named)
        with plain_mode():
            found = self._entries.get(call.key) if call.key is not None else None
            return (found or self._prepare(call, limit=None)).plan

    def save(self, path: str | Path) -> None:
        """Write all plans with their weights to one file, which `load` maps into memory.

        The model is traced for other sizes to find out which of them the file can be used for.

        Args:
            path: A safetensors file; an old one is replaced when the new one is complete, a missing folder is made.

        Raises:
            UsageError: If the model could not be traced, or holds what a file cannot name.
            CheckpointError: If the file cannot be written; an old one is as it was.
        """
        source, first = self._source.value, self._first
        with _LOCK, plain_mode():
            axes = source.free_axes(first)
        save_entries(Path(path), self.plans_by_shape, name=source.name, signature=self._caller.signature, axes=axes)

    @property
    def plans_by_shape(self) -> tuple[Entry, ...]:
        """What runs each shape, the example's first."""
        others = [entry for entry in list(self._entries.values()) if entry is not self._first]
        return (self._first, *others)

    def train(self, mode: bool = True) -> Self:
        """Refuse training; `eval` changes nothing.

        Raises:
            UsageError: If ``mode`` is true.
        """
        if mode:
            raise UsageError(
                "a deployed network cannot be trained: its batch norms are folded and it has no gradients; "
                "train the model that it was made from, then deploy again"
            )
        return self

    def extra_repr(self) -> str:
        """Tell what it runs as."""
        return f"{self._source.value.name}, runs as: {self.plan.engine}"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "a deployed network cannot be pickled: it holds machine code for this process; "
            "write it with deployed.save(path) and read it with sparsetwin.runtime.load(path)"
        )

    def __deepcopy__(self, memory: Mapping[int, Any]) -> "Deployed":
        twin = Deployed.__new__(Deployed)
        nn.Module.__init__(twin)
        twin.__dict__.update({name: found for name, found in self.__dict__.items() if not name.startswith("_modules")})
        twin._warned = False
        return twin

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise UsageError(
            "a deployed network stays in float32 on this CPU: convert or move the model, then deploy it again"
        )

    def _prepare(self, call: Call, limit: int | None = SHAPES) -> Entry:
        source = self._source.value
        with _LOCK:
            found = self._entries.get(call.key) if call.key is not None else None
            if found is not None:
                return found
            full = limit is not None and len(self._entries) >= limit
            run = source.without_plan(call) if full or call.key is None else None
            if run is not None:
                return Entry(call=call, run=run, plan=self._first.plan)
            entry = source.entry(call, self._first)
            if full:
                self._entries.pop(next(key for key, old in self._entries.items() if old is not self._first))
                self._quick.clear()
            if call.key is not None:
                self._entries[call.key] = entry
            return entry

    def _again(self, call: Call) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a result for {call.describe()} is not finite; it is computed again by the original network, "
                "as all such results will be, without further warning",
                SparsityWarning,
                stacklevel=4,
            )
        return self._source.value.reference(call)


class _Hidden:
    """Keeps a model out of the sight of `nn.Module`, which would take it for a submodule."""

    def __init__(self, value: Source) -> None:
        self.value = value
