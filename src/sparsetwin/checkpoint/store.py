"""Run checkpoints: each is one file with its own checksum, and the newest good one is found after any stop."""

import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsetwin.checkpoint._atomic import HashedWriter, remove, remove_stale, replace_file
from sparsetwin.checkpoint._plain import check_loadable
from sparsetwin.errors import CheckpointError, nearest

_VERSION = 1
_STEP_FILE = re.compile(r"step-(\d{9,})\.pt")
_NAME = re.compile(r"(?!step-)[a-z0-9][a-z0-9._-]{0,99}")
_TRAILER = b"\nsparsetwin sha256 "  # then the hash of all before it, in hexadecimal, and a newline
_TRAILER_BYTES = len(_TRAILER) + 64 + 1


class CheckpointWarning(UserWarning):
    """A checkpoint that was skipped because it is corrupted or truncated."""


class CheckpointStore:
    """The checkpoints of one run in a folder: the newest ``keep``, and named ones for good.

    A checkpoint is a file of ``torch.save`` with a line behind it that holds its sha256; ``torch.load`` reads it as it
    is. The folder has one writer at a time; in distributed training, one process saves.

    Args:
        folder: Where the checkpoints are; it is made by the first `save`.
        keep: How many of the newest to keep, at least 1; two survive the loss of one.

    Raises:
        CheckpointError: If ``keep`` is less than 1.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"keep needs to be at least 1 checkpoint, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints in the folder, ascending; that they are good is seen on loading."""
        found = (_STEP_FILE.fullmatch(path.name) for path in self._files())
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the named checkpoints in the folder, sorted."""
        return tuple(sorted(path.stem for path in self._files() if _NAME.fullmatch(path.stem)))

    def save(self, state: Mapping[str, Any], *, step: int, name: str | None = None) -> Path:
        """Write a checkpoint; only when it is complete, older ones are deleted.

        Checkpoints of later steps are deleted as well: they belong to a course of the run that was left when it was
        resumed from an earlier step.

        Args:
            state: Numbers, strings, tensors, and lists, tuples and dicts of them.
            step: Optimizer steps done, ``step >= 0``.
            name: Keeps the checkpoint under this name instead, until it is saved again.

        Returns:
            The file.

        Raises:
            CheckpointError: If ``state`` holds something else, naming it, if ``name`` or ``step`` cannot be used, or
                if the disk is full; all earlier checkpoints are then as they were.
        """
        if step < 0:
            raise CheckpointError(f"steps are counted from 0, got {step}")
        path = self._step_path(step) if name is None else self._named_path(name)
        check_loadable(state if type(state) is dict else dict(state), what="state")
        remove_stale(self.folder)
        payload = {"version": _VERSION, "step": int(step), "name": name, "state": dict(state)}
        replace_file(path, lambda file: _write(payload, file))
        if name is None:
            kept = [other for other in self.steps if other <= step][-self.keep :]
            for other in set(self.steps) - set(kept):
                remove(self._step_path(other))
        return path

    def load(self, step: int) -> dict[str, Any]:
        """Return the state saved at a step, its tensors on the CPU.

        Raises:
            CheckpointError: If there is none, or it is corrupted, truncated or foreign.
        """
        if step not in self.steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; steps: {_listed(self.steps)}")
        found, state = _read(self._step_path(step))
        if found != step:
            raise CheckpointError(f"{self._step_path(step)} holds step {found}; it was renamed")
        return state

    def load_named(self, name: str) -> tuple[int, dict[str, Any]]:
        """Return the step and the state saved under a name, tensors on the CPU.

        Raises:
            CheckpointError: If there is none, or it is corrupted, truncated or foreign.
        """
        path = self._named_path(name)
        if name not in self.names:
            known = f"names: {_listed(self.names)}{nearest(name, self.names)}"
            raise CheckpointError(f"no checkpoint named {name!r} in {self.folder}; {known}")
        return _read(path)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return the step and the state of the newest good checkpoint, or None if none was ever saved.

        Named checkpoints do not count. One that is corrupted or truncated is skipped with a `CheckpointWarning`.

        Raises:
            CheckpointError: If there are checkpoints, but not one is good; the message says why for each.
        """
        problems: list[str] = []
        for step in reversed(self.steps):
            try:
                state = self.load(step)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; resuming from step {step} instead", CheckpointWarning, stacklevel=2)
            return step, state
        if problems:
            raise CheckpointError(f"no checkpoint in {self.folder} can be used: {'; '.join(problems)}")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[!.]*.pt"))

    def _step_path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _named_path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            allowed = "lower-case letters, digits, '.', '_' and '-', not beginning with 'step-'"
            raise CheckpointError(f"a checkpoint's name holds {allowed}, got {name!r}")
        return self.folder / f"{name}.pt"


def _write(payload: Mapping[str, Any], file: HashedWriter) -> None:
    torch.save(payload, file)  # type: ignore[arg-type]
    file.write(_TRAILER + file.sha256().encode() + b"\n")


def _read(path: Path) -> tuple[int, dict[str, Any]]:
    _check_trailer(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(payload, dict) or payload.get("version") != _VERSION:
        found = payload.get("version") if isinstance(payload, dict) else None
        raise CheckpointError(f"{path} is a checkpoint of version {found}, this library reads version {_VERSION}")
    return payload["step"], payload["state"]


def _check_trailer(path: Path) -> None:
    """Refuse a file whose last line is not the sha256 of all before it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            expected = _hash_of(file, max(size - _TRAILER_BYTES, 0))
            found = file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not (found.startswith(_TRAILER) and found.endswith(b"\n")):
        raise CheckpointError(f"{path} is truncated or no checkpoint of this library: it does not end in its sha256")
    if found != _TRAILER + expected.encode() + b"\n":
        raise CheckpointError(f"{path} is corrupted: its sha256 is not the one that it ends in")


def _hash_of(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "none"
