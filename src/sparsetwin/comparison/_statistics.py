"""Means, intervals and paired differences of a few runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mpmath import betainc, findroot

from sparsetwin.errors import ConfigError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Several values of one kind."""

    count: int
    mean: float
    deviation: float  # of the sample; NaN of one value
    half_width: float  # of the 95% interval of the mean, from Student's t; NaN of one value


@dataclass(frozen=True)
class Difference:
    """How two methods differ on the same seeds."""

    count: int
    mean: float
    half_width: float  # of its 95% interval
    p_value: float  # two-sided, of a paired t-test; NaN of fewer than two pairs


def summary(values: Sequence[float]) -> Summary:
    """Return mean, deviation and interval.

    >>> summary([1.0, 2.0, 3.0])
    Summary(count=3, mean=2.0, deviation=1.0, half_width=2.48...)

    Raises:
        ConfigError: If there is no value.
    """
    if not values:
        raise ConfigError("a summary needs at least one value")
    if len(values) == 1:
        return Summary(1, values[0], math.nan, math.nan)
    deviation = stdev(values)
    half_width = t_quantile(CONFIDENCE, len(values) - 1) * deviation / math.sqrt(len(values))
    return Summary(len(values), fmean(values), deviation, half_width)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return how much the first values exceed the second, pair by pair.

    Raises:
        ConfigError: If they are not equally many, or there is none.
    """
    if len(first) != len(second):
        raise ConfigError(f"pairs need equally many values, got {len(first)} and {len(second)}")
    found = summary([a - b for a, b in zip(first, second, strict=True)])
    if found.count < 2:
        return Difference(found.count, found.mean, math.nan, math.nan)
    if not found.deviation:
        return Difference(found.count, found.mean, 0.0, 0.0 if found.mean else 1.0)
    t = abs(found.mean) / (found.deviation / math.sqrt(found.count))
    return Difference(found.count, found.mean, found.half_width, 1 - t_within(t, found.count - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Source: Holm, 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def t_within(t: float, freedom: int) -> float:
    """Return the probability that Student's t lies between -t and t.

    >>> round(t_within(2.776, 4), 4)
    0.95
    """
    return 1.0 - float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True))


def t_quantile(confidence: float, freedom: int) -> float:
    """Return the t within which Student's t lies with that probability.

    >>> round(t_quantile(0.95, 4), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    return float(
        findroot(lambda t: t_within(float(t), freedom) - confidence, (low, high), solver="illinois", tol=1e-10)
    )
