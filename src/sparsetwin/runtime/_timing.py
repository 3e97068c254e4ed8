"""Timing on a machine that others use too: the shortest of a few runs for parts, medians for whole networks."""

import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping

import torch

_ENOUGH = 2e-3  # seconds of runs of one part
_RUNS = 5


def clock_for(threads: int) -> Callable[[], float]:
    """Return the clock to time by: the process's processor time for one thread, else the wall's.

    A long call is interrupted by other processes more often than a short one, which processor time does not count.
    """
    return time.process_time if threads == 1 and torch.get_num_threads() == 1 else time.perf_counter


def shortest(run: Callable[[], object], *, threads: int, runs: int = _RUNS) -> float:
    """Return the seconds of the fastest of a few runs, after one that is not counted."""
    run()
    clock = clock_for(threads)
    best, spent = float("inf"), 0.0
    for _ in range(runs):
        started = clock()
        run()
        taken = clock() - started
        best, spent = min(best, taken), spent + taken
        if spent > _ENOUGH * runs:
            break
    return best


def race(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    threads: int,
    skipped: MutableMapping[str, str] | None = None,
    last_resort: str | None = None,
) -> dict[str, float]:
    """Return each contestant's median seconds; they take turns, in reversed order every other round.

    Args:
        contestants: By name.
        rounds: That count; one more goes before them.
        threads: Of the kernels.
        skipped: Takes the reason of each contestant that raises an exception, which is then left out. None: it is
            raised.
        last_resort: The contestant whose exceptions are raised nevertheless; the last one left is another.

    >>> list(race({"a": lambda: None, "b": lambda: None}, rounds=3, threads=1))
    ['a', 'b']
    """
    clock = clock_for(threads)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(-1, rounds):
        for name in tuple(names):
            started = clock()
            try:
                contestants[name]()
            except Exception as error:  # whatever a model or an engine raises
                if skipped is None or name == last_resort or len(names) == 1:
                    raise
                skipped[name] = reason_of(error)
                names.remove(name)
                del seconds[name]
                continue
            if number >= 0:
                seconds[name].append(clock() - started)
        names.reverse()
    return {name: statistics.median(found) for name, found in seconds.items()}


def reason_of(error: Exception) -> str:
    """Return an exception in one line.

    >>> reason_of(ValueError("too long"))
    'ValueError: too long'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
