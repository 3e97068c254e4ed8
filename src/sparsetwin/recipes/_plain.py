"""Frozen dataclasses as plain data, and back with every type checked."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from sparsetwin.data import DataSource
from sparsetwin.errors import ConfigError, nearest
from sparsetwin.recipes._imports import import_object


def to_plain(value: Any, *, known: Mapping[str, type], where: str) -> Any:
    """Return a configuration as JSON-able data.

    Args:
        value: A dataclass, or a value of one of its fields.
        known: Classes by the name under which they are written; others are written as ``package.module:Class``.
        where: Its name in messages.

    Raises:
        ConfigError: If a part is no plain data.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        name = cls.__name__ if known.get(cls.__name__) is cls else f"{cls.__module__}:{cls.__qualname__}"
        return {"type": name, **{f.name: _field_to_plain(value, f.name, known, where) for f in dataclasses.fields(cls)}}
    if isinstance(value, (tuple, list)):
        return [to_plain(item, known=known, where=where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item, known=known, where=f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(
        f"{where} is {value!r}; run.json holds None, finite numbers, strings, and lists and dicts of them"
    )


def from_plain(data: Any, annotation: Any, *, known: Mapping[str, type], where: str) -> Any:
    """Return the value that `to_plain` wrote.

    Args:
        data: Plain data.
        annotation: Type that is expected.
        known: As in `to_plain`.
        where: Its name in messages.

    Raises:
        ConfigError: If a class or a field is unknown or missing, or a value is of another type.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) or annotation is DataSource:
        assert isinstance(annotation, type)
        return _object(data, annotation, known, where)
    if origin in (Union, types.UnionType):
        return _one_of(data, inner, known, where)
    if origin is Literal:
        if data not in inner:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, inner))}, got {data!r}")
        return data
    if origin is tuple:
        return _tuple(data, inner, known, where)
    if annotation is float and isinstance(data, int) and not isinstance(data, bool):
        return data
    if annotation is Path and isinstance(data, str):
        return Path(data)
    kind = dict if origin is dict else type(None) if annotation is None else annotation
    if kind is not Any and (not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool)):
        raise ConfigError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {data!r}")
    return data


def _field_to_plain(value: Any, name: str, known: Mapping[str, type], where: str) -> Any:
    return to_plain(getattr(value, name), known=known, where=f"{where}.{name}")


def _object(data: Any, expected: type, known: Mapping[str, type], where: str) -> Any:
    if not isinstance(data, Mapping) or not isinstance(data.get("type"), str):
        raise ConfigError(f"{where}: expected an object with a type, got {data!r}")
    cls = _class(data["type"], expected, known, where)
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    for name in data:
        if name not in (*fields, "type"):
            raise ConfigError(f"{where}: {cls.__name__} has no field {name!r}{nearest(name, fields)}")
    for name in fields:
        if name not in data:
            raise ConfigError(f"{where}: the field {name!r} of {cls.__name__} is missing")
    values = {name: from_plain(data[name], hints[name], known=known, where=f"{where}.{name}") for name in fields}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _class(name: str, expected: type, known: Mapping[str, type], where: str) -> Any:
    if ":" in name:
        cls = import_object(name)
    elif name in known:
        cls = known[name]
    else:
        raise ConfigError(f"{where}: unknown configuration class {name!r}{nearest(name, known)}")
    if not (isinstance(cls, type) and issubclass(cls, expected) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{where}: expected a {expected.__name__} that is a dataclass, got {name}")
    return cls


def _one_of(data: Any, options: tuple[Any, ...], known: Mapping[str, type], where: str) -> Any:
    for option in options:
        try:
            return from_plain(data, option, known=known, where=where)
        except ConfigError:
            continue
    names = " or ".join("null" if option is type(None) else getattr(option, "__name__", "?") for option in options)
    raise ConfigError(f"{where}: expected {names}, got {data!r}")


def _tuple(data: Any, inner: tuple[Any, ...], known: Mapping[str, type], where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        raise ConfigError(f"{where}: expected a list, got {data!r}")
    if Ellipsis not in inner and len(inner) != len(data):
        raise ConfigError(f"{where}: expected {len(inner)} values, got {data!r}")

    def kinds() -> Iterator[Any]:
        yield from (inner[:1] * len(data) if Ellipsis in inner else inner)

    return tuple(
        from_plain(item, kind, known=known, where=f"{where}[{index}]")
        for index, (item, kind) in enumerate(zip(data, kinds(), strict=True))
    )
