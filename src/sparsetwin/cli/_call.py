"""What commands share: parsing a dataclass from arguments, printing for people and for programs."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

T = TypeVar("T")

Switch: TypeAlias = tyro.conf.FlagCreatePairsOff[bool]
"""A flag that is off unless given."""
RunPath: TypeAlias = Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
"""A run folder, by position."""
DataPath: TypeAlias = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
"""A folder of data, or none."""


def parse(cls: type[T], arguments: Sequence[str], *, command: str, default: T | None = None) -> T:
    """Fill a command's dataclass from arguments; a wrong one ends the process with code 2 and a suggestion.

    Args:
        cls: The dataclass; its docstrings are the help.
        arguments: What follows the command's name.
        command: Its name, for the usage line.
        default: Values to override.
    """
    if default is None:
        return tyro.cli(cls, args=list(arguments), prog=f"sparsetwin {command}")
    return tyro.cli(cls, args=list(arguments), prog=f"sparsetwin {command}", default=default)


def print_json(values: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own; numbers that are not finite, which JSON lacks, become null."""
    print(json.dumps(_finite(values), sort_keys=True, allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; columns that hold a digit in every row stand to the right."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        is_number = index > 0 and all(any(map(str.isdigit, row[index])) for row in rows)
        table.add_column(heading, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def console() -> Console:
    """Return a console on the current standard output; wide enough for tables where that is no terminal."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140, highlight=False)
