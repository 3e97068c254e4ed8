"""What ``resume`` and ``eval`` need to know of a run: its ``run.json``, read and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetwin.errors import CheckpointError, ConfigError
from sparsetwin.recipes import Recipe, recipe_from_plain
from sparsetwin.training import RunFolder


@dataclass(frozen=True, kw_only=True)
class Description:
    """A run as it was begun."""

    recipe: Recipe
    threads: int
    data: Path | None  # folder of the data set
    plain: dict[str, Any]  # all of run.json


def read_description(folder: RunFolder) -> Description:
    """Return what ``run.json`` says.

    Raises:
        CheckpointError: If there is no run, or its description is malformed or of another version.
    """
    plain = folder.read()
    for key, kind in (("config", dict), ("threads", int), ("versions", dict), ("machine", dict)):
        if not isinstance(plain.get(key), kind):
            raise CheckpointError(f"{folder.description}: {key!r} should be of type {kind.__name__}, got "
                                  f"{plain.get(key)!r}")  # fmt: skip
    data = plain.get("data")
    if not (data is None or isinstance(data, str)) or plain["threads"] < 1:
        raise CheckpointError(f"{folder.description}: 'data' should be a path or null, and 'threads' at least 1")
    try:
        recipe = recipe_from_plain(plain["config"])
    except ConfigError as error:
        raise CheckpointError(f"{folder.description}: {error}") from error
    return Description(recipe=recipe, threads=plain["threads"], data=None if data is None else Path(data), plain=plain)
