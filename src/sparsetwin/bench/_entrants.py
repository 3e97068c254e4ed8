"""What engines have in common: a case to run, and calls that can be timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from sparsetwin.bench._settings import BenchSettings, Precision
from sparsetwin.errors import SparsetwinError
from sparsetwin.export import export_onnx


class NotHereError(Exception):
    """Why an engine does not run here, or not this network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entrant:
    """An engine that is ready for one batch."""

    run: Callable[[], Tensor]  # one call: float32 inputs to float32 outputs
    turn: Callable[[int], list[float]]  # so many calls: the seconds of each
    note: str = ""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A row of the table."""

    label: str
    precision: Precision
    make: Callable[["Case"], Entrant]

    @property
    def name(self) -> str:
        """Tell it from all others."""
        return f"{self.label}, {self.precision}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A network with the inputs of one call."""

    model: nn.Module  # in evaluation mode, on the CPU
    inputs: Tensor
    settings: BenchSettings
    files: "OnnxFiles"


@dataclass(kw_only=True, eq=False)
class OnnxFiles:
    """The network as ONNX files, each written when it is first asked for."""

    model: nn.Module
    samples: Tensor
    folder: Path

    def fp32(self) -> Path:
        """Return the file with a free batch size.

        Raises:
            NotHereError: If the network cannot be exported.
        """
        if isinstance(self._exported, Path):
            return self._exported
        raise NotHereError(self._exported)

    @cached_property
    def _exported(self) -> Path | str:
        path = self.folder / "model.onnx"
        try:
            export_onnx(self.model, self.samples, path=path)
        except SparsetwinError as error:
            return f"no ONNX file: {first_line(error)}"
        return path


def in_process(run: Callable[[], Tensor], note: str = "") -> Entrant:
    """Return an entrant that is timed here, by the wall's clock."""

    def turn(calls: int) -> list[float]:
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return seconds

    return Entrant(run=run, turn=turn, note=note)


def first_line(error: BaseException) -> str:
    """Return what an error says, shortly."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = [f"{lines[0]} {lines[1]}"]
    return lines[0][:300] if lines else type(error).__name__
