"""Two ways for each node, a price for each and for changing between neighbours: a minimum cut chooses."""

from collections import deque
from collections.abc import Iterable

_FOREVER = 1e9  # seconds; more than any network takes


class Cut:
    """Points that belong to one of two sides, the costs of sides, and what it costs when two points differ."""

    def __init__(self) -> None:
        self._capacity: dict[int, dict[int, float]] = {0: {}, 1: {}}

    def point(self, *, first: float = 0.0, second: float = 0.0) -> int:
        """Add a point that costs ``first`` on the first side and ``second`` on the second; return its number."""
        number = len(self._capacity)
        self._capacity[number] = {}
        self._edge(0, number, second)
        self._edge(number, 1, first)
        return number

    def differ(self, here: int, there: int, cost: float = _FOREVER) -> None:
        """Charge a cost if the one point is on the first side and the other on the second."""
        self._edge(here, there, cost)

    def first_side(self) -> set[int]:
        """Return the points on the first side of the cheapest choice."""
        while (found := self._shortest_path()) is not None:
            path, flow = found
            for here, there in path:
                self._capacity[here][there] -= flow
                self._capacity[there][here] = self._capacity[there].get(here, 0.0) + flow
        return set(self._reached()) - {0}

    def _edge(self, here: int, there: int, cost: float) -> None:
        cost = min(cost, _FOREVER)
        self._capacity[here][there] = self._capacity[here].get(there, 0.0) + cost
        self._capacity[there].setdefault(here, 0.0)

    def _reached(self) -> dict[int, int]:
        """Return where each point that the source still reaches is reached from."""
        before, waiting = {0: 0}, deque([0])
        while waiting:
            here = waiting.popleft()
            for there, left in self._capacity[here].items():
                if left > 1e-12 and there not in before:
                    before[there] = here
                    waiting.append(there)
        return before

    def _shortest_path(self) -> tuple[list[tuple[int, int]], float] | None:
        before = self._reached()
        if 1 not in before:
            return None
        path, there = [], 1
        while there != 0:
            path.append((before[there], there))
            there = before[there]
        return path, min(self._capacity[here][there] for here, there in path)


def converted_once(cut: Cut, value: int, readers: Iterable[int], *, to_second: float, to_first: float) -> None:
    """Charge one conversion of a value, however many readers are on the other side."""
    readers = list(readers)
    if not readers:
        return
    down, up = cut.point(), cut.point()
    cut.differ(value, down, to_second)
    cut.differ(up, value, to_first)
    for reader in readers:
        cut.differ(down, reader)
        cut.differ(reader, up)
