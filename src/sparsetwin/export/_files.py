"""Exported files that are either the old ones or the new ones, and the packages that write them."""

import importlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsetwin.errors import ExportError


def need(package: str, *, to: str, install: str) -> Any:
    """Import an optional package.

    Raises:
        ExportError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(f"{to} needs {package}, which is not installed; run: pip install {install}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place to write a file, and files beside it, and move all of them into place at the end of the block.

    The file itself is moved last. If the block fails, nothing is left behind and the earlier files are kept.

    Args:
        path: Of the file; its folder is made if needed.

    Raises:
        ExportError: If the disk is full or a file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield folder / path.name
        for written in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            written.replace(path.parent / written.name)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
