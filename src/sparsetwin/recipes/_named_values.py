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
