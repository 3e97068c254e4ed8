"""What a run tells: events to ``metrics.jsonl`` and to whoever listens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sparsetwin.checkpoint import append_line, truncate_log
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
    """

    def __init__(self, folder: RunFolder, listeners: Sequence[Listener] = ()) -> None:
        self._folder = folder
        self._listeners = list(listeners)
        self.size = folder.metrics.stat().st_size if folder.metrics.exists() else 0

    def listen(self, listeners: Sequence[Listener]) -> None:
        """Hand further events to these listeners too."""
        self._listeners.extend(listeners)

    def event(self, event: Event) -> None:
        """Write one line of ``metrics.jsonl``."""
        self.size = append_line(self._folder.metrics, event)
        for listener in self._listeners:
            listener.event(event)

    def time(self, event: Event) -> None:
        """Write one line of ``timing.jsonl``."""
        append_line(self._folder.timing, event)

    def progress(self, progress: Progress) -> None:
        """Tell listeners where the run is."""
        for listener in self._listeners:
            listener.progress(progress)

    def rewind(self, size: int) -> None:
        """Cut ``metrics.jsonl`` to the length it had at a checkpoint.

        Raises:
            CheckpointError: If it is shorter than that.
        """
        truncate_log(self._folder.metrics, size)
        self.size = size
