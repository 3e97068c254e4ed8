"""What was measured, as plain data."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsetwin.bench._settings import Precision
from sparsetwin.errors import CheckpointError

RESULT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine: milliseconds of a call, and how its answers compare with PyTorch's."""

    engine: str
    precision: Precision
    median_ms: float
    min_ms: float
    quartiles_ms: tuple[float, float]
    per_second: float  # samples, at the median
    relative_error: float  # max|y - ref| / max|ref|
    same_predictions: float  # share of all samples
    note: str
    turn_medians_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All engines on one batch; ``missing`` holds the reason for each that has no row."""

    batch: int
    rows: tuple[Row, ...]
    missing: Mapping[str, str]

    def fastest(self, *, ours: bool, precisions: tuple[Precision, ...]) -> Row | None:
        """Return the fastest row of sparsetwin, or of all others."""
        rows = [row for row in self.rows if row.precision in precisions and (row.engine == "sparsetwin") == ours]
        return min(rows, key=lambda row: row.median_ms, default=None)

    def verdicts(self) -> tuple[str, ...]:
        """Compare sparsetwin with the fastest other engine that had the same permission to round."""
        found: list[str] = []
        permissions: dict[str, tuple[Precision, ...]] = {"fp32 only": ("fp32",), "bf16 allowed": ("fp32", "bf16")}
        for words, allowed in permissions.items():
            ours, other = (self.fastest(ours=which, precisions=allowed) for which in (True, False))
            if ours is not None and other is not None and not (found and self._has_no("bf16")):
                found.append(
                    f"{words}: sparsetwin takes {ours.median_ms:.3g} ms, the fastest other ({other.engine}, "
                    f"{other.precision}) {other.median_ms:.3g} ms: {other.median_ms / ours.median_ms:.2f} times as fast"
                )
        return tuple(found)

    def _has_no(self, precision: Precision) -> bool:
        return not any(row.precision == precision for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """A whole benchmark."""

    name: str  # of what was measured
    inputs: str
    date: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    contests: tuple[Contest, ...]

    def plain(self) -> dict[str, Any]:
        """Return all as what JSON can hold."""
        contests = [{**asdict(contest), "verdicts": list(contest.verdicts())} for contest in self.contests]
        return {"version": RESULT_VERSION, **asdict(self), "contests": contests}


def write_result(result: BenchResult, path: Path) -> None:
    """Write a benchmark as JSON; the file appears at once and whole.

    Raises:
        CheckpointError: If it cannot be written.
    """
    text = json.dumps(result.plain(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_text(text)
            whole.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
