"""A dict on the command line: ``NAME=VALUE ...``, where a value is a Python literal or else a string."""

import ast
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec


def parse_named_values(arguments: list[str]) -> dict[str, Any]:
    """Return what ``NAME=VALUE`` arguments say.

    >>> parse_named_values(["dropout=0.3", "sizes=(1, 2)", "kind=wide"])
    {'dropout': 0.3, 'sizes': (1, 2), 'kind': 'wide'}

    Raises:
        ValueError: If an argument has no name or no equals sign.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"expected NAME=VALUE, got {argument!r}")
        values[name] = _literal(value)
    return values


def parse_patterns(arguments: list[str]) -> dict[str, Any]:
    """Return what ``PATTERN=NUMBER`` arguments say, where a pattern may itself hold an equals sign.

    >>> parse_patterns(["conv1=0.5", "re:layer[12][.].*=0.9"])
    {'conv1': 0.5, 're:layer[12][.].*': 0.9}

    Raises:
        ValueError: If an argument has no pattern or no number.
    """
    values: dict[str, Any] = {}
    for argument in arguments:
        pattern, _, number = argument.rpartition("=")
        if not pattern:
            raise ValueError(f"expected PATTERN=NUMBER, got {argument!r}")
        values[pattern] = float(number)
    return values


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


NAMED_VALUES = PrimitiveConstructorSpec(
    nargs="*",
    metavar="NAME=VALUE ...",
    instance_from_str=parse_named_values,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda values: [f"{name}={value!r}" for name, value in values.items()],
)
"""Annotation that makes a dict field such an option."""

NAMED_NUMBERS = PrimitiveConstructorSpec(
    nargs="*",
    metavar="PATTERN=NUMBER ...",
    instance_from_str=parse_patterns,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda values: [f"{name}={value!r}" for name, value in values.items()],
)
"""The same for numbers by the name of a layer, a glob or an expression."""
