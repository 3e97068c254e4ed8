"""Typed reading of JSON objects: a field that is missing or of another type is an error that names its place."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sparsetwin.errors import CheckpointError, nearest


@dataclass(frozen=True)
class Record:
    """One JSON object and where it stands."""

    place: str  # as in "runs/a/metrics.jsonl, line 3"
    fields: dict[str, object]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def integer(self, name: str) -> int:
        """Return a whole number that is not negative."""
        value = self._given(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, "a whole number that is not negative")
        return value

    def number(self, name: str) -> float:
        """Return a number; NaN and infinity, as a failed run has them, are numbers."""
        value = self._given(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        return float(value)

    def fraction(self, name: str) -> float:
        """Return a number from 0 to 1, or NaN."""
        value = self.number(name)
        if not (math.isnan(value) or 0.0 <= value <= 1.0):
            raise self._wrong(name, "a fraction from 0 to 1")
        return value

    def text(self, name: str) -> str:
        """Return a string."""
        value = self._given(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a string, or None if the field is null or missing."""
        return self.text(name) if self.has(name) else None

    def record(self, name: str) -> "Record":
        """Return an object within this one."""
        value = self._given(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Record(f"{self.place}, {name}", cast(dict[str, object], value))

    def optional_record(self, name: str) -> "Record | None":
        """Return an object within this one, or None if the field is null or missing."""
        return self.record(name) if self.has(name) else None

    def rows(self, name: str, *, length: int) -> list[list[float]]:
        """Return a list of lists of ``length`` numbers each."""
        value = self._given(name)
        if not isinstance(value, list) or not all(_is_row(row, length) for row in value):
            raise self._wrong(name, f"a list of lists of {length} numbers")
        return cast(list[list[float]], value)

    def row(self, name: str, *, length: int) -> list[float]:
        """Return a list of ``length`` numbers."""
        value = self._given(name)
        if not _is_row(value, length):
            raise self._wrong(name, f"a list of {length} numbers")
        return cast(list[float], value)

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        value = self._given(name)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self._wrong(name, "a list of strings")
        return value

    def _given(self, name: str) -> object:
        if name not in self.fields:
            raise CheckpointError(f"{self.place}: the field {name!r} is missing{nearest(name, self.fields)}")
        return self.fields[name]

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.place}: {name!r} should be {expected}, got {self.fields[name]!r}")


def read_object(path: Path) -> Record:
    """Return the one JSON object that a file holds.

    Raises:
        CheckpointError: If the file is missing or holds something else.
    """
    text = _read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold one JSON object, got {type(value).__name__}")
    return Record(str(path), value)


def read_lines(path: Path) -> Iterator[Record]:
    """Yield the JSON objects of a file that has one a line.

    A last line that no newline ends is still being written, or was when its process died; it is left out.

    Raises:
        CheckpointError: If the file is missing or a finished line is something else.
    """
    lines = _read_text(path).split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{place} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{place} should hold one JSON object, got {type(value).__name__}")
        yield Record(place, value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; a run folder is what `sparsetwin train --out` writes") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _is_row(value: object, length: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value)
    )
