"""What a run tells: events to ``metrics.jsonl`` and to whoever listens."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparsetwin.checkpoint import append_line, truncate_log
from sparsetwin.errors import CheckpointError
from sparsetwin.training.run_folder import RunFolder

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is, after some steps; for progress bars."""

    stage: str
    step: int
    total_steps: int
    steps_per_epoch: int
    phase: int
    phase_sparsity: float
    loss: float
    accuracy: float


class Listener(Protocol):
    """Gets what a run tells while it goes."""

    def event(self, event: Event) -> None:
        """Get an event, as it stands in ``metrics.jsonl``."""

    def progress(self, progress: Progress) -> None:
        """Get the position and the latest training scores, every few steps."""


class Journal:
    """Writes events to the run folder and hands them to listeners.

    Args:
        folder: The run folder.
        listeners: Get every event after it is on disk.
        writes: Whether this is the process that writes; the others' events go nowhere.
    """

    def __init__(self, folder: RunFolder, listeners: Sequence[Listener] = (), *, writes: bool = True) -> None:
        self._folder = folder
        self._writes = writes
        self._listeners = list(listeners)

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Hand further events to these listeners too."""
        self._listeners.extend(listeners)

    def event(self, event: Event) -> None:
        """Write one line of ``metrics.jsonl``."""
        if not self._writes:
            return
        append_line(self._folder.metrics, event)
        for listener in self._listeners:
            listener.event(event)

    def time(self, event: Event) -> None:
        """Write one line of ``timing.jsonl``."""
        if self._writes:
            append_line(self._folder.timing, event)

    def progress(self, progress: Progress) -> None:
        """Tell listeners where the run is."""
        for listener in self._listeners:
            listener.progress(progress)

    @property
    def sizes(self) -> dict[str, int]:
        """Lengths of the logs in bytes, for `rewind`."""
        return {"metrics": _size(self._folder.metrics), "timing": _size(self._folder.timing)}

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Cut the logs to the lengths that they had at a checkpoint.

        Args:
            sizes: As `sizes` gave them; nothing empties the logs.

        Raises:
            CheckpointError: If ``metrics.jsonl`` is shorter than that. Wall times are not worth an error.
        """
        truncate_log(self._folder.metrics, sizes.get("metrics", 0))
        with suppress(CheckpointError):
            truncate_log(self._folder.timing, min(sizes.get("timing", 0), _size(self._folder.timing)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
