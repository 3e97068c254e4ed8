"""The cheapest choice of two ways for each node is found: compared with trying all of them."""

import itertools
import random

import pytest

from sparsetwin.runtime._cut import Cut, converted_once


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_costs_no_more_than_any_choice(seed):
    chosen = random.Random(seed)
    count = chosen.randint(1, 8)
    costs = [(chosen.random(), chosen.random()) for _ in range(count)]
    readers = {node: [other for other in range(node + 1, count) if chosen.random() < 0.5] for node in range(count)}
    changes = [(chosen.random(), chosen.random()) for _ in range(count)]

    def total(sides):
        own = sum(costs[node][side] for node, side in enumerate(sides))
        for node, side in enumerate(sides):
            if any(sides[reader] != side for reader in readers[node]):  # once, for however many
                own += changes[node][side]
        return own

    cut = Cut()
    points = [cut.point(first=first, second=second) for first, second in costs]
    for node, others in readers.items():
        to_second, to_first = changes[node]
        converted_once(cut, points[node], [points[other] for other in others], to_second=to_second, to_first=to_first)
    first = cut.first_side()
    found = total([0 if point in first else 1 for point in points])
    assert found == pytest.approx(min(total(sides) for sides in itertools.product((0, 1), repeat=count)))


def test_a_run_of_nodes_changes_only_when_it_is_worth_both_conversions():
    for gain, sides in ((0.4, [0, 0, 0]), (0.6, [0, 1, 0])):
        cut = Cut()
        points = [cut.point(first=0, second=9), cut.point(first=gain, second=0), cut.point(first=0, second=9)]
        converted_once(cut, points[0], [points[1]], to_second=0.25, to_first=0.25)
        converted_once(cut, points[1], [points[2]], to_second=0.25, to_first=0.25)
        first = cut.first_side()
        assert [0 if point in first else 1 for point in points] == sides
