"""Where a run keeps its files: ``run.json``, ``metrics.jsonl``, ``timing.jsonl``, ``checkpoints/``, ``pair/``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsetwin.errors import CheckpointError, UsageError

RUN_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def description(self) -> Path:
        """Whole configuration and environment, written before data or model are built."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; reproducible, without wall times."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """Wall times, one JSON object an epoch."""
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

    def create(self, description: Mapping[str, Any]) -> None:
        """Make the folder and write ``run.json``.

        Args:
            description: Plain data; the version and the time are added.

        Raises:
            UsageError: If a run is there already, or the folder holds other files.
            CheckpointError: If it cannot be written.
        """
        if self.description.exists():
            raise UsageError(f"{self.path} holds a run already; continue it with: sparsetwin resume {self.path}")
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            raise UsageError(f"{self.path} is not empty; give a new folder with --out")
        whole = {"version": RUN_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds"), **description}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.description.with_suffix(".tmp")
            temporary.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
            temporary.replace(self.description)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.description}: {error.strerror}") from error

    def read(self) -> dict[str, Any]:
        """Return what ``run.json`` says.

        Raises:
            CheckpointError: If there is no run, it is malformed or of another version.
        """
        if not self.description.is_file():
            raise CheckpointError(f"{self.path} is no run folder: it has no run.json")
        try:
            described = json.loads(self.description.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.description} cannot be read: {error}") from error
        version = described.get("version") if isinstance(described, dict) else None
        if version != RUN_VERSION:
            raise CheckpointError(
                f"{self.description} is of version {version!r}; this release reads version {RUN_VERSION}"
            )
        whole: dict[str, Any] = described
        return whole
