"""Plain data: what goes into JSON, and what ``torch.load(weights_only=True)`` takes back."""

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sparsetwin.errors import CheckpointError

JSON: TypeAlias = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None

_LOADABLE = (type(None), bool, int, float, str, bytes, Tensor, nn.Parameter, torch.Size, torch.dtype)
_KEYS = (bool, int, float, str, type(None))


def dump_json(value: object, *, what: str, indent: int | None = None) -> str:
    """Return a value as JSON with sorted keys: equal values give equal text.

    Args:
        value: None, numbers, strings, and lists, tuples and dicts with string keys of them.
        what: Its name in messages.
        indent: Spaces a level, or None for a single line.

    Raises:
        CheckpointError: If a part of it is something else or not finite; the message says which.
    """
    _check_json(value, what)
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, allow_nan=False, indent=indent, separators=separators)


def parse_json(text: str | bytes, *, what: str) -> JSON:
    """Return what a JSON text holds.

    Raises:
        CheckpointError: If it is none, holds NaN or an infinity, or names a key of an object twice.
    """
    try:
        value: JSON = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{what} is not valid JSON: {error}") from error
    return value


def check_loadable(value: object, *, what: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not give back.

    Raises:
        CheckpointError: If a part of it is not None, a number, a string, bytes, a tensor, or a list, tuple or dict of
            such; the message says which part.
    """
    if type(value) in (dict, OrderedDict):
        assert isinstance(value, Mapping)
        for key, item in value.items():
            if type(key) not in _KEYS:
                raise CheckpointError(f"{what} has the key {key!r} of type {_type_name(key)}; write strings or numbers")
            check_loadable(item, what=f"{what}[{key!r}]")
    elif type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        for index, item in enumerate(value):
            check_loadable(item, what=f"{what}[{index}]")
    elif type(value) not in _LOADABLE:
        raise CheckpointError(
            f"{what} is of type {_type_name(value)}, which a checkpoint cannot hold; "
            "write numbers, strings, tensors, and lists and dicts of them"
        )


def _check_json(value: object, what: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{what} has the key {key!r} of type {_type_name(key)}; JSON keys are strings")
            _check_json(item, f"{what}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{what}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{what} is {value!r}; JSON has finite numbers only, write None for what is missing")
    elif not isinstance(value, bool | int | str | None):
        raise CheckpointError(f"{what} is of type {_type_name(value)}; JSON has numbers, strings, lists and dicts")


def _object(pairs: list[tuple[str, JSON]]) -> JSON:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("an object names a key twice")
    return values


def _refuse_constant(constant: str) -> JSON:
    raise ValueError(f"{constant} is not a JSON number")


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
