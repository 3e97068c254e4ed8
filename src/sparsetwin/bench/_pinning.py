"""Processors: those that a run is held on, and a limit on how long something may take."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from sparsetwin.errors import ConfigError


class TooLongError(Exception):
    """Something took longer than it was given."""


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Hold this process on as many processors as it has threads, one a core where there are enough; PyTorch as well.

    Args:
        threads: Of each engine.

    Yields:
        The processors; none where a system cannot do that.

    Raises:
        ConfigError: If there are fewer processors.
    """
    before = torch.get_num_threads()
    allowed = _allowed()
    if threads > len(allowed):
        raise ConfigError(f"threads={threads}, but this process may run on {len(allowed)} processors")
    chosen = tuple(_apart(allowed)[:threads]) if hasattr(os, "sched_setaffinity") else ()
    torch.set_num_threads(threads)
    try:
        if chosen:
            _hold(chosen)
        yield chosen
    finally:
        torch.set_num_threads(before)
        if chosen:
            _hold(allowed)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer; without effect off the main thread and where there are no such signals.

    Raises:
        TooLongError: At that time, again every second until it is heard.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    error = TooLongError(f"took longer than {seconds:g} s to prepare")
    is_over = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True
        raise error

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except Exception as raised:  # compilers put what interrupts them into errors of their own
        if is_over:
            raise error from raised
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _apart(processors: list[int]) -> list[int]:
    """Return the processors, those first that share no core with an earlier one."""
    cores: dict[str, list[int]] = {}
    for processor in processors:
        shared = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        cores.setdefault(shared.read_text() if shared.exists() else str(processor), []).append(processor)
    return sorted(processors, key=lambda p: next(group.index(p) for group in cores.values() if p in group))


def _hold(processors: tuple[int, ...] | list[int]) -> None:
    """Move every thread of this process; later ones follow the thread that starts them."""
    tasks = Path("/proc/self/task")
    for number in [int(task.name) for task in tasks.iterdir()] if tasks.exists() else [0]:
        try:
            os.sched_setaffinity(number, processors)
        except OSError:  # the thread has ended
            continue
