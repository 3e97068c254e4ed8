"""Turns: every engine has one in every round, so that what disturbs the machine disturbs all of them alike."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from sparsetwin.bench._entrants import Entrant
from sparsetwin.bench._settings import BenchSettings

_MOST_CALLS = 500  # of a turn
_FEWEST_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of calls: of each turn the median, and the shortest of all."""

    turns: tuple[float, ...]
    shortest: float

    @property
    def median(self) -> float:
        """Of all turns."""
        return statistics.median(self.turns)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of all turns, the lower and the upper."""
        low, _, high = statistics.quantiles(self.turns, n=4, method="inclusive")
        return low, high


def race(entrants: Mapping[str, Entrant], settings: BenchSettings) -> tuple[dict[str, Times], dict[str, str]]:
    """Time entrants against each other.

    They take turns, in reversed order every other round; a turn begins with a call that is not counted. One that
    breaks down has no further turns.

    Returns:
        The times, and for each entrant that broke down what it said.
    """
    calls: dict[str, int] = {}
    broken: dict[str, str] = {}
    turns: dict[str, list[float]] = {name: [] for name in entrants}
    shortest: dict[str, float] = {}
    spent = dict.fromkeys(entrants, 0.0)
    names = list(entrants)
    for number in range(-1, settings.rounds):
        for name in names:
            done = len(turns[name]) >= _FEWEST_TURNS and spent[name] > settings.engine_seconds
            if name in broken or done:
                continue
            try:
                seconds = entrants[name].turn(1 + calls.get(name, 2))[1:]
            except Exception as error:
                broken[name] = f"broke down while it was timed: {error}"
                continue
            if number < 0:  # warm-up
                calls[name] = min(_MOST_CALLS, max(1, round(settings.turn_seconds / max(min(seconds), 1e-9))))
                continue
            turns[name].append(statistics.median(seconds))
            shortest[name] = min(shortest.get(name, seconds[0]), *seconds)
            spent[name] += sum(seconds)
        names.reverse()
    times = {
        name: Times(turns=tuple(found), shortest=shortest[name])
        for name, found in turns.items()
        if name not in broken and found
    }
    return times, broken
