"""Objects by ``package.module:name``, also from the folder in which the command runs."""

import importlib
import os
import sys
from typing import Any

from sparsetwin.errors import ConfigError, nearest


def import_object(reference: str) -> Any:
    """Return what ``package.module:name`` refers to; modules in the current folder are found too.

    Raises:
        ConfigError: If it is not of that form, or there is no such module or name.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise ConfigError(f"expected package.module:name, got {reference!r}")
    here = os.getcwd()  # noqa: PTH109  as an entry of sys.path, which holds strings
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"cannot import {module_name!r} of {reference!r}: {error}; modules are looked for in the current folder "
            "and where Python finds its packages"
        ) from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name} has no {name!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    return found
