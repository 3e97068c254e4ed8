"""A few threads that wait for pieces of a product. Kernels run without the GIL, so plain threads are enough."""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from sparsetwin.errors import ConfigError

Piece = Callable[[], None]
_LOCK = threading.Lock()


def _fresh_lock() -> None:
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_fresh_lock)


class Pool:
    """Runs the pieces of a call on ``threads`` threads, the caller's among them.

    Threads start with the first call that needs them, end with the pool, and are started anew after a fork. Several
    threads may use one pool. Which thread runs a piece changes no result.
    """

    _process = -1  # the one whose threads are running

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ConfigError(f"threads={threads}; expected at least 1")
        self.threads = threads
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()

    def run(self, pieces: Sequence[Piece]) -> None:
        """Run every piece once, in any order, and return when all are done. An exception is raised here."""
        if self.threads == 1 or len(pieces) < 2:
            for piece in pieces:
                piece()
            return
        self._start()
        call = _Call(pieces)
        for _ in range(min(self.threads, len(pieces)) - 1):
            self._queue.put(call)
        call.work()
        call.wait()

    def close(self) -> None:
        """End the threads; the pool may be used again."""
        with _LOCK:
            if self._process == os.getpid():
                for _ in range(self.threads - 1):
                    self._queue.put(None)
            self._process = -1
            self._queue = SimpleQueue()

    def __del__(self) -> None:
        if self._process == os.getpid():
            for _ in range(self.threads - 1):
                self._queue.put(None)

    def _start(self) -> None:
        if self._process == os.getpid():
            return
        with _LOCK:
            if self._process == os.getpid():
                return
            self._queue = SimpleQueue()
            for number in range(1, self.threads):
                name = f"sparsetwin-{number}"
                threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True).start()
            self._process = os.getpid()


class _Call:
    """The pieces of one call, taken by whoever is free."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.left = deque(pieces)
        self.pieces = len(pieces)
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(self) -> None:
        while True:
            try:
                piece = self.left.popleft()
            except IndexError:
                return
            try:
                piece()
            except BaseException as error:
                self.done.put(error)
            else:
                self.done.put(None)

    def wait(self) -> None:
        errors = [error for _ in range(self.pieces) if (error := self.done.get()) is not None]
        if errors:
            raise errors[0]


def _serve(queue: "SimpleQueue[_Call | None]") -> None:
    while (call := queue.get()) is not None:
        call.work()
        del call
