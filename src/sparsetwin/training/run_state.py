"""Whether a checkpoint belongs to the run that is to go on from it."""

from collections.abc import Iterator, Mapping
from typing import Any

from sparsetwin.errors import CheckpointError

_MISSING = "nothing"


def check_state(state: Mapping[str, Any], *, version: int, config: object, where: str) -> None:
    """Refuse a checkpoint of another version, or of a run of another configuration.

    Args:
        state: The checkpoint.
        version: That can be read.
        config: Configuration of the run, as plain data.
        where: The file that says so, for messages.

    Raises:
        CheckpointError: Naming the first field that differs.
    """
    if state.get("version") != version:
        raise CheckpointError(
            f"the checkpoint is of version {state.get('version')!r}; this release reads version {version}"
        )
    found = next(differences(state.get("config"), config), None)
    if found is not None:
        name, trained, now = found
        raise CheckpointError(
            f"{where} says {name} = {now!r}, but its checkpoints were trained with {trained!r}; put it back, or train "
            "with the new configuration into another folder (--out)"
        )


def differences(old: Any, new: Any, *, name: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the old and the new value of everything that differs between two plain values.

    >>> list(differences({"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1}))
    [('config.lr', 0.1, 0.2)]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key, _MISSING), new.get(key, _MISSING), name=f"{name}.{key}")
    elif old != new:
        yield name, old, new
