"""Where a run keeps its files: ``run.json``, ``metrics.jsonl``, ``timing.jsonl``, ``checkpoints/``, ``pair/``."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsetwin.errors import CheckpointError, UsageError

RUN_VERSION = 1
FINAL_EVENT = "final"  # the last line of a finished run


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def description(self) -> Path:
        """Whole configuration and environment, written before data or model are built."""
        return self.path / "run.json"

    @property
    def _temporary(self) -> Path:
        return self.description.with_suffix(".tmp")

    @property
    def metrics(self) -> Path:
        """One JSON object a line; reproducible, without wall times."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """Wall times, one JSON object an epoch, and one more where a stop cut the epoch."""
        return self.path / "timing.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def pair(self) -> Path:
        """Folder of the dense and the sparse half."""
        return self.path / "pair"

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.path / "report.html"

    def create(self, description: Mapping[str, Any]) -> list[Path]:
        """Make the folder and write ``run.json``.

        Args:
            description: Plain data; the version and the time are added.

        Returns:
            The folders that were made for it, the innermost first; `discard` takes them away again.

        Raises:
            UsageError: If a run is there already, or the folder holds other files, or is none.
            CheckpointError: If it cannot be written; nothing is left behind.
        """
        self._check_free()
        whole = {"version": RUN_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds"), **description}
        text = json.dumps(whole, indent=2, sort_keys=True) + "\n"
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self._temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            self._temporary.replace(self.description)
        except OSError as error:
            self.discard(made)
            raise CheckpointError(f"cannot write {self.description}: {error.strerror}") from error
        return made

    def discard(self, made: list[Path]) -> None:
        """Remove what a run that came to nothing has left.

        Args:
            made: As `create` returned it. A folder that was there before stays, empty as it was.
        """
        if self.path in made:
            shutil.rmtree(self.path, ignore_errors=True)
        elif self.path.is_dir():
            for entry in self.path.iterdir():
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @property
    def is_finished(self) -> bool:
        """Whether the final test is written; nothing is left to do then but to verify."""
        return self.last_event().get("event") == FINAL_EVENT

    def keep_only(self, *, pair: bool) -> None:
        """Delete what a finished run needs no more: its checkpoints, and unless it is kept its pair.

        What stays is the run's record (``run.json``, ``metrics.jsonl``, ``timing.jsonl``) and its report.
        """
        for folder in (self.checkpoints, *(() if pair else (self.pair,))):
            if folder.is_dir():
                shutil.rmtree(folder)

    @property
    def is_untrained(self) -> bool:
        """Whether the folder holds nothing that training has brought about: no epoch, no phase, no checkpoint."""
        return self.last_event().get("event", "start") == "start" and not any(self.checkpoints.glob("*.pt"))

    def last_event(self) -> Mapping[str, Any]:
        """Return the last whole line of ``metrics.jsonl``, or nothing if there is none."""
        if not self.metrics.exists():
            return {}
        for line in reversed(self.metrics.read_bytes().splitlines()):
            try:
                event = json.loads(line)
            except ValueError:  # a line that its process did not live to finish
                continue
            if isinstance(event, dict):
                return event
        return {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock goes with the process, however it ends.

        Raises:
            UsageError: If another process trains there.
        """
        with self.description.open("rb") as file:
            if not _lock(file.fileno()):
                raise UsageError(f"another process is training in {self.path}; wait for it or stop it first")
            yield

    def read(self) -> dict[str, Any]:
        """Return what ``run.json`` says.

        Raises:
            CheckpointError: If there is no run, it is malformed or of another version.
        """
        if not self.description.is_file():
            raise CheckpointError(f"{self.path} is no run folder: it has no run.json")
        try:
            described = json.loads(self.description.read_text())
        except (OSError, ValueError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
            raise CheckpointError(f"{self.description} cannot be read: {error}") from error
        if not isinstance(described, dict):
            raise CheckpointError(f"{self.description} should hold one JSON object, got a {type(described).__name__}")
        if described.get("version") != RUN_VERSION:
            raise CheckpointError(
                f"{self.description} is of version {described.get('version')!r}; this release reads version "
                f"{RUN_VERSION}"
            )
        whole: dict[str, Any] = described
        return whole

    def _check_free(self) -> None:
        try:
            if self.path.is_dir():
                if self.description.exists():
                    raise UsageError(
                        f"{self.path} holds a run already; continue it with: sparsetwin resume {self.path}, or give "
                        "another folder with --out"
                    )
                if any(entry != self._temporary for entry in self.path.iterdir()):  # a killed process may leave that
                    raise UsageError(f"{self.path} holds other files; give a new or an empty folder with --out")
            elif self.path.exists() or self.path.is_symlink():
                raise UsageError(f"{self.path} is no folder; give a new one with --out")
        except OSError as error:
            raise UsageError(f"cannot look into {self.path}: {error.strerror}; give another --out") from error


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file; where files cannot be locked, do without."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True
