"""What a person sees while a run goes: a bar in a terminal, plain lines elsewhere."""

import sys
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sparsetwin.training import Event
from sparsetwin.training import Progress as Position


class PlainLines:
    """One line an epoch and one for each phase that ends."""

    def event(self, event: Event) -> None:
        """Print epochs and phases."""
        line = describe(event)
        if line:
            print(line, flush=True)

    def progress(self, progress: Position) -> None:
        """Print nothing between epochs."""

    def close(self) -> None:
        """Nothing is open."""


class Bar:
    """A progress bar with phase, sparsity, loss, accuracy and the time left; phases stay as lines above it."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._progress.start()

    def event(self, event: Event) -> None:
        """Leave a line for each phase that ends."""
        if event["event"] == "phase":
            self._progress.console.print(describe(event), highlight=False)

    def progress(self, progress: Position) -> None:
        """Move the bar of the stage."""
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._progress.add_task("", total=progress.total_steps)
        kind = f"sparse {progress.phase_sparsity:.4g}" if progress.phase_sparsity else "dense"
        self._progress.update(
            self._tasks[progress.stage],
            completed=progress.step,
            description=(
                f"{progress.stage}: phase {progress.phase} ({kind}) "
                f"loss {progress.loss:.3f} accuracy {progress.accuracy:.1%}"
            ),
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def make_display(*, quiet: bool) -> "PlainLines | Bar | None":
    """Return what shows progress: nothing if quiet, a bar in a terminal, plain lines elsewhere."""
    if quiet:
        return None
    return Bar() if sys.stdout.isatty() else PlainLines()


def describe(event: Event) -> str:
    """Return an event as a line, or nothing for those that are not shown."""
    if event["event"] == "start":
        targets = sum(event["targets"].values())
        return f"{event['epochs']} epochs of {event['steps_per_epoch']} steps, {targets:,} target weights"
    if event["event"] not in ("epoch", "phase"):
        return ""
    held = event["holdout"]
    found = f", hold-out {held['accuracy']:.2%}" if held else ""
    if event["event"] == "epoch":
        kind = f"sparse {event['phase_sparsity']:.4g}" if event["phase_sparsity"] else "dense"
        return (
            f"{event['stage']} epoch {event['epoch']}: phase {event['phase']} ({kind}), "
            f"loss {event['train']['loss']:.4f}, train {event['train']['accuracy']:.2%}{found}"
        )
    kind = f"sparse {event['sparsity']:.4g}, {event['kept']:,} weights kept" if event["sparsity"] else "dense"
    return f"{event['stage']}: phase {event['phase']} ends at step {event['step']} ({kind}){found}"
