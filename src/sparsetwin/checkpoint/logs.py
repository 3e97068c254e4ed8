"""Logs with one JSON object a line, which a resumed run cuts back to where its checkpoint stands."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from sparsetwin.checkpoint._plain import JSON, dump_json
from sparsetwin.errors import CheckpointError


def append_line(path: str | Path, values: Mapping[str, JSON]) -> int:
    """Append one line of JSON with sorted keys, in a single write that reaches the disk.

    Args:
        path: The log; it is made if needed.
        values: Plain data; NaN and infinities are refused, None stands for what is missing.

    Returns:
        The log's length in bytes after the line, for `truncate_log`.

    Raises:
        CheckpointError: If ``values`` is not plain data, or the line cannot be written; the log is then as it was.
    """
    path = Path(path)
    line = (dump_json(dict(values), what=f"the line for {path.name}") + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            return _append(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"cannot append to {path}: {error.strerror}, the log is as it was") from error


def truncate_log(path: str | Path, size: int) -> None:
    """Cut a log to a length that `append_line` returned, so that a resumed run writes its lines only once.

    Args:
        path: The log; it may be missing if ``size`` is 0.
        size: Bytes to keep, ``size >= 0``.

    Raises:
        CheckpointError: If the log is shorter than that, or ``size`` is not the end of a line.
    """
    path = Path(path)
    if size < 0:
        raise CheckpointError(f"a log's length is at least 0 bytes, got {size}")
    if size == 0 and not path.exists():
        return
    try:
        with path.open("r+b") as file:
            found = file.seek(0, os.SEEK_END)
            if found < size:
                raise CheckpointError(f"{path} has {found} bytes, but its run had already written {size}")
            file.seek(max(size - 1, 0))
            if size and file.read(1) != b"\n":
                raise CheckpointError(f"{path} has no line that ends at byte {size}; it is not the log of this run")
            if found > size:
                file.truncate(size)
                os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot cut {path} to {size} bytes: {error.strerror}") from error


def _append(descriptor: int, line: bytes) -> int:
    before = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, "no space for the whole line")
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, before)
        raise
    return before + len(line)
