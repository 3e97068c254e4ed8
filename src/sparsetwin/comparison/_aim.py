"""A method whose sparsity is not asked for but comes out: trials that look for the setting that gives it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

CLOSE = 0.005
"""Difference of sparsities, as fractions, up to which a trial has found what it looked for."""

_NORMAL = NormalDist()
_EDGE = 1e-4  # densities nearer to 0 or 1 count as this far from them


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A setting that sparsity grows with, about as the logarithm of a threshold."""

    path: str  # field of the recipe
    first: float  # of the first trial
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the trials alone: field of the recipe -> value


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One trial."""

    value: float
    sparsity: float  # achieved; NaN of a trial that failed, which counts as too sparse
    holdout: float  # accuracy; NaN of one that failed


def next_value(aim: Aim, tried: Sequence[Tried], *, goal: float) -> float:
    """Return the value to try next.

    Thresholds act on weights as if these were normal: ``log(quantile(1 - density / 2))`` is about a straight line of
    the value, which is drawn through the nearest trials. With one trial its slope is 1. Between a trial that is too
    dense and one that is too sparse the next one stays between them.

    Args:
        aim: What is set.
        tried: Earlier trials.
        goal: Sparsity to reach, in (0, 1).
    """
    if not tried:
        return aim.first
    places = sorted((trial.value, _height(trial.sparsity) - _height(goal)) for trial in tried)
    low = max((place for place in places if place[1] < 0), default=None)
    high = min((place for place in places if place[1] >= 0), default=None)
    value, height = min(places, key=lambda place: abs(place[1]))
    others = [place for place in places if place[0] != value]
    slope = 1.0
    if others:
        nearest = min(others, key=lambda place: abs(place[1]))
        slope = min(max((height - nearest[1]) / (value - nearest[0]), 0.25), 4.0)
    proposed = value - height / slope
    if low is not None and high is not None and not low[0] < proposed < high[0]:
        return (low[0] + high[0]) / 2
    return proposed


def best_trial(tried: Sequence[Tried], *, goal: float) -> int:
    """Return which trial is taken: of those that came close to the goal the best by hold-out, else the closest one."""
    close = [index for index, trial in enumerate(tried) if abs(trial.sparsity - goal) <= CLOSE]
    if close:
        return max(close, key=lambda index: tried[index].holdout)
    return min(range(len(tried)), key=lambda index: abs(_achieved(tried[index].sparsity) - goal))


def _height(sparsity: float) -> float:
    density = min(max(1 - _achieved(sparsity), _EDGE), 1 - _EDGE)
    return math.log(_NORMAL.inv_cdf(1 - density / 2))


def _achieved(sparsity: float) -> float:
    return 1.0 if math.isnan(sparsity) else sparsity
