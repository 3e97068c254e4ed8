"""A few threads that wait for pieces of a product. Kernels run without the GIL, so plain threads are enough."""

import os
import threading
import time
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

    Threads start with the first call that needs them, end with the pool, and are started anew after a fork; where none
    can be had, the caller's does it all. Several threads may use one pool. Which thread runs a piece changes no result.
    """

    _process = -1  # the one whose threads are running

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ConfigError(f"threads={threads}; expected at least 1")
        self.threads = threads
        self._queue: SimpleQueue[_Shared | None] = SimpleQueue()

    def run(self, pieces: Sequence[Piece]) -> None:
        """Run every piece once, in any order, and return when all are done. An exception is raised here."""
        if self.threads == 1 or len(pieces) < 2:
            for piece in pieces:
                piece()
            return
        call = _Call(pieces)
        self.share(call.work, here=call.complete, others=min(self.threads, len(pieces)) - 1)

    def share(self, work: Piece, *, here: Piece, others: int | None = None) -> None:
        """Run ``here`` on the caller's thread, and ``work`` on others that come before it has ended.

        Args:
            work: Takes a part of what is left to do, at any time; nothing is left when ``here`` has ended. It must come
                to its end whatever becomes of ``here``.
            here: Returns when all is done. If it raises, the others have ended too when that is raised here.
            others: How many are asked; all by default.
        """
        self._start()
        shared = _Shared(work)
        try:
            for _ in range(self.threads - 1 if others is None else others):
                self._queue.put(shared)
            here()
        except BaseException:
            shared.close()
            raise
        shared.closed = True

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
                thread = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more threads; those that are there do the work
                    break
            self._process = os.getpid()


class _Shared:
    """What the threads of a pool are asked to take part in."""

    def __init__(self, work: Piece) -> None:
        self._work = work
        self.closed = False
        self._come: list[None] = []  # one for each thread that came; append is atomic
        self._gone: list[None] = []

    def join(self) -> None:
        """Take part, unless it is over."""
        self._come.append(None)
        try:
            if not self.closed:
                self._work()
        finally:
            self._gone.append(None)

    def close(self) -> None:
        """Let no thread in any more, and wait for those that are."""
        self.closed = True
        while len(self._come) > len(self._gone):
            time.sleep(1e-4)


class _Call:
    """The pieces of one call, taken by whoever is free."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.left = deque(pieces)
        self.pieces = len(pieces)
        self.done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work(self) -> None:
        """Run pieces as long as there are some."""
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

    def complete(self) -> None:
        """Run pieces, and wait for those of others. If this is interrupted, no further piece is begun."""
        try:
            self.work()
            errors = [error for _ in range(self.pieces) if (error := self.done.get()) is not None]
        except BaseException:
            self.left.clear()
            raise
        if errors:
            raise errors[0]


def _serve(queue: "SimpleQueue[_Shared | None]") -> None:
    while (shared := queue.get()) is not None:
        shared.join()
        del shared
