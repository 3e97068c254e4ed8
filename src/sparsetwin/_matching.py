"""How a parameter is named in a configuration: by its name, its module's, a glob or a ``re:`` expression."""

import fnmatch
import re
from collections.abc import Callable

from sparsetwin.errors import TargetError


def name_matcher(selector: str) -> Callable[[str], bool]:
    """Return a function that tells whether a canonical name is meant.

    Args:
        selector: A parameter's name, or a module's, which stands for its weight; a glob over such names; or ``re:`` and
            a regular expression that matches a whole parameter name.

    Raises:
        TargetError: If what follows ``re:`` is no regular expression.
    """
    if selector.startswith("re:"):
        try:
            pattern = re.compile(selector[3:])
        except re.error as error:
            raise TargetError(f"{selector!r} is not a regular expression: {error}") from error
        return lambda name: pattern.fullmatch(name) is not None
    if any(character in selector for character in "*?["):
        return lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in (selector, f"{selector}.weight"))
    return lambda name: name in (selector, f"{selector}.weight")
