"""Files that are either the old ones or the new ones, whenever the process or the machine stops.

A file is written under a temporary name in the same folder, flushed to the disk and renamed. A folder has one writer
at a time; readers may come at any moment.
"""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sparsetwin.errors import CheckpointError

_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.tmp")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HashedWriter:
    """A binary file that hashes what is written, and remembers the error that stopped it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None  # libraries in between may replace the one that was raised

    def write(self, data: bytes | memoryview) -> int:
        """Write all of ``data`` and return its length in bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Flush the file's buffer."""
        self._file.flush()

    def sha256(self) -> str:
        """Return the hash of all that was written so far, in hexadecimal."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Written:
    """A complete file under a temporary name, on the disk, that waits to be given its own."""

    temporary: Path
    path: Path
    sha256: str

    def discard(self) -> None:
        """Remove it; an error here must not hide the one that led to it."""
        try:
            self.temporary.unlink(missing_ok=True)
        except OSError:
            return


def write_temporary(path: Path, write: Callable[[HashedWriter], object]) -> Written:
    """Write a file beside ``path`` and flush it to the disk.

    Args:
        path: The name that it is to get; its folder is made if needed.
        write: Called with the open file.

    Raises:
        CheckpointError: If the disk is full or the file cannot be written; nothing is left behind, and a file at
            ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    written = Written(temporary, path, "")
    hashed: HashedWriter | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            hashed = HashedWriter(file)
            write(hashed)
            file.flush()
            os.fsync(file.fileno())
        return Written(temporary, path, hashed.sha256())
    except BaseException as error:
        written.discard()
        cause = error if isinstance(error, OSError) else hashed.error if hashed else None
        if cause is not None and isinstance(error, Exception):
            raise _cannot_write(path, cause) from error
        raise


def put_in_place(written: Written) -> None:
    """Give a written file its name, in place of the file that has it.

    Raises:
        CheckpointError: If it cannot be renamed; the temporary file is removed.
    """
    rename(written.temporary, written.path, on_failure=written.discard)


def replace_file(path: Path, write: Callable[[HashedWriter], object]) -> str:
    """Write a file in place of the one at ``path``, which stays whole until the new one is, and return its sha256.

    Raises:
        CheckpointError: As `write_temporary` and `put_in_place` do.
    """
    written = write_temporary(path, write)
    put_in_place(written)
    return written.sha256


def replace_by_name(path: Path, write: Callable[[Path], object]) -> None:
    """Do what `replace_file` does by something that wants a name to write to, and no open file.

    Args:
        path: The name that the file is to get; its folder is made if needed.
        write: Called with another name in that folder, which no other writer has; makes a file of it.

    Raises:
        CheckpointError: As `write_temporary` and `put_in_place` do, for any `OSError`.
    """
    written = Written(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), path, "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(written.temporary)
        with written.temporary.open("rb+") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        written.discard()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    put_in_place(written)


def rename(old: Path, new: Path, *, on_failure: Callable[[], None] = lambda: None) -> None:
    """Rename a file within its folder, so that a power cut does not undo it.

    Raises:
        CheckpointError: If the rename fails, after ``on_failure`` was called, or its folder cannot be flushed.
    """
    try:
        os.replace(old, new)  # noqa: PTH105  the call itself, whose atomicity everything here rests on
    except BaseException as error:
        on_failure()
        if isinstance(error, OSError):
            raise _cannot_write(new, error) from error
        raise
    try:
        _sync_folder(new.parent)
    except OSError as error:
        raise CheckpointError(f"{new} is written, but a power cut may undo it: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        CheckpointError: If it is there and cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot remove {path}: {error.strerror}") from error


def remove_stale(folder: Path, *, target: str | None = None) -> None:
    """Remove the temporary files that a killed process left in a folder.

    Args:
        folder: A folder that nobody else is writing to.
        target: Only those that were to get this name.
    """
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and target in (None, found["target"]):
            remove(path)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal.

    Raises:
        CheckpointError: If the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    what = "disk full while writing" if error.errno in _DISK_FULL else "cannot write"
    left = "the previous file is kept" if path.exists() else "no file is left"
    return CheckpointError(f"{what} {path}: {error.strerror or error}, {left}")


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
