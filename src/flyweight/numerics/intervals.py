"""Intervals and tests for per-sample numbers: what a test set of this size can say, and what it cannot.

Everything here takes plain numbers (sequences, arrays, tensors are turned into float64 arrays) and is exact or in
closed form: no resampling, so the same data give the same interval. Two-sided, 95 % unless `level` says otherwise.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import bdtr, ndtri, stdtrit  # what scipy.stats calls; its import is slow

from flyweight.errors import DataError, NumericsError
from flyweight.types import Interval

__all__ = [
    "holm",
    "items_needed",
    "items_to_decide",
    "mcnemar_p",
    "mean_interval",
    "paired_difference",
    "paired_proportions",
    "proportion",
    "resolution",
    "scaled",
]

Numbers = NDArray[np.float64]

MANY = 10**9  # "more samples than anybody has": where no number of samples decides
FEW_CHANGES = 10  # below this, a mean of differences is a count of rare events and not nearly normal


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in another unit, e.g. `scaled(drop, 100)` in percentage points. A negative factor turns it round."""
    low, high = sorted((interval.low * factor, interval.high * factor))
    return Interval(interval.value * factor, low, high, interval.level)


def proportion(successes: float, items: float, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share; never without width, never outside 0..1. DataError without items.

    Source: Wilson 1927, JASA 22:209-212.
    """
    if items <= 0:
        raise DataError("a share of no items has no interval", fix="give at least one test sample")
    share, z = successes / items, _normal(level)
    centre = (share + z * z / (2 * items)) / (1 + z * z / items)
    half = z * math.sqrt(share * (1 - share) / items + (z / (2 * items)) ** 2) / (1 + z * z / items)
    # at 0 and 1 the ends are exact in the formula, and would be off by a rounding error in the arithmetic
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == items else min(1.0, centre + half)
    return Interval(share, low, high, level)


def mean_interval(values: Any, level: float = 0.95) -> Interval:
    """The mean of per-sample numbers: Wilson's interval for 0/1 outcomes, else Student t corrected for skewness.

    Numbers that are all equal have no width, unless they are all 1 (all right, which the next sample need not be):
    all 0 is what the divergence of an unchanged model looks like.
    Divergences are non-negative with a long right tail, where Student's interval is too short above: Hall's cubic
    transformation of the t statistic removes the skewness and leaves symmetric data as they are. Infinite values (an
    artifact that answers NaN) give the largest float, since JSON knows no infinity. Raises DataError for fewer than
    two samples, NumericsError for NaN.
    Source: Hall 1992, J. R. Statist. Soc. B 54:221-228, eq. 2.2; normal quantiles are replaced by Student's.
    """
    numbers = _numbers(values)
    if np.isinf(numbers).any():
        worst = math.copysign(sys.float_info.max, float(numbers[np.isinf(numbers)][0]))
        return Interval(worst, worst, worst, level)
    if _is_binary(numbers) and numbers.any():
        return proportion(float(numbers.sum()), len(numbers), level)
    count, mean, deviation = len(numbers), float(numbers.mean()), float(numbers.std(ddof=1))
    if deviation == 0.0:
        return Interval(mean, mean, mean, level)
    skewness = float(((numbers - mean) ** 3).mean()) / deviation**3
    t = float(stdtrit(count - 1, 0.5 + level / 2))
    step = deviation / math.sqrt(count)
    low, high = (mean - step * _unskewed(end, skewness, count) for end in (t, -t))
    return Interval(mean, low, high, level)


def _unskewed(quantile: float, skewness: float, count: int) -> float:
    """The inverse of Hall's transformation g(T) = T + gT²/3 + g²T³/27 + g/6 with g = skewness / sqrt(count)."""
    g = skewness / math.sqrt(count)
    if abs(g) < 1e-9:
        return quantile
    return 3.0 / g * (float(np.cbrt(1.0 + g * (quantile - g / 6.0))) - 1.0)


def paired_difference(before: Any, after: Any, level: float = 0.95) -> Interval:
    """The mean of before - after over the same samples (a drop is positive), as a fraction.

    0/1 outcomes: Tango's score interval, which has width even if nothing changed. Real values: `mean_interval` of the
    differences; with fewer than 10 differences from zero two pseudo-pairs are added, one each way, that differ by the
    whole range of the values (as Agresti and Min 2005, Statist. Med. 24:729-740, do for proportions), since nearly
    unchanged samples would otherwise promise more than so few items know. Raises DataError for unequal lengths.
    """
    first, second = _numbers(before), _numbers(after)
    if len(first) != len(second):
        raise DataError(f"{len(first)} samples before cannot be paired with {len(second)} after")
    if _is_binary(first) and _is_binary(second):
        worse, better = int(((first == 1) & (second == 0)).sum()), int(((first == 0) & (second == 1)).sum())
        return paired_proportions(worse, better, len(first), level)
    difference = first - second
    if not np.isfinite(difference).all() or np.count_nonzero(difference) >= FEW_CHANGES:
        return mean_interval(np.where(np.isnan(difference), math.inf, difference), level)
    spread = float(max(first.max(), second.max()) - min(first.min(), second.min()))
    half = _half_width(np.append(difference, (spread, -spread)), level)
    mean = float(difference.mean())
    return Interval(mean, mean - half, mean + half, level)


def _half_width(values: Numbers, level: float) -> float:
    count = len(values)
    return float(stdtrit(count - 1, 0.5 + level / 2) * values.std(ddof=1) / math.sqrt(count))


def paired_proportions(worse: float, better: float, items: float, level: float = 0.95) -> Interval:
    """Tango's score interval of (worse - better) / items, from the two counts of changed pairs.

    All differences that the score test does not reject: (worse - better - n d)² = z² n (2 q + d (1 - d)), where q is
    the maximum-likelihood share of `better` given d. Counts may be fractions (for `items_needed`).
    Source: Tango 1998, Statist. Med. 17:891-908, eqs. 8-11.
    """
    if items <= 0:
        raise DataError("a difference over no items has no interval", fix="give at least one test sample")
    observed, z2 = (worse - better) / items, _normal(level) ** 2

    def excess(delta: float) -> float:
        b = -worse - better + (2 * items - worse + better) * delta
        c = -better * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * items * c)) - b) / (4 * items)
        variance = max(0.0, items * (2 * q + delta * (1 - delta)))
        return (worse - better - items * delta) ** 2 - z2 * variance

    return Interval(observed, _end(excess, observed, -1.0), _end(excess, observed, 1.0), level)


def _end(excess: Callable[[float], float], inside: float, edge: float) -> float:
    """Where `excess` turns positive between the observed difference and the edge of -1..1."""
    if excess(edge) <= 0.0 or inside == edge:
        return edge
    # at the observed difference itself the variance can be 0 in the arithmetic; a step towards the edge is inside
    start = inside + (edge - inside) * 1e-12
    return float(optimize.brentq(excess, start, edge, xtol=1e-13)) if excess(start) < 0.0 else inside


def mcnemar_p(worse: int, better: int) -> float:
    """The exact two-sided p-value that a change in either direction is equally likely; 1 without changes.

    Source: McNemar 1947, Psychometrika 12:153-157, in its exact (binomial) form.
    """
    changed = worse + better
    return min(1.0, 2.0 * float(bdtr(min(worse, better), changed, 0.5))) if changed else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The p-values corrected for how many were asked, in the given order.

    Source: Holm 1979, Scand. J. Statist. 6:65-70.
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return tuple(corrected)


def resolution(items: int, discordance: float, level: float = 0.95) -> float:
    """The smallest drop (a fraction) that `items` pairs can rule out if nothing is lost.

    `discordance` is the share of items that change between right and wrong, evenly both ways.
    """
    changed = discordance * items / 2
    return paired_proportions(changed, changed, items, level).high


def items_needed(limit: float, discordance: float, difference: float = 0.0, level: float = 0.95) -> int:
    """How many test items decide whether a drop of `difference` is within `limit` (fractions, not points).

    `discordance` is the observed share of items that changed between right and wrong. Gives 10**9 where no number of
    items decides (the drop sits on the limit).
    """
    share = min(1.0, max(discordance, abs(difference)))
    worse, better = (share + difference) / 2, (share - difference) / 2

    def decided(items: int) -> bool:
        found = paired_proportions(worse * items, better * items, items, level)
        return found.high <= limit or found.low > limit

    if not decided(MANY):
        return MANY
    low, high = 0, 1
    while not decided(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def items_to_decide(interval: Interval, limit: float, items: int) -> int:
    """About how many items would decide an undecided limit, for any mean: widths shrink as 1 / sqrt(items)."""
    distance = abs(limit - interval.value)
    half = interval.high - interval.value if limit > interval.value else interval.value - interval.low
    if distance == 0.0 or half / distance > math.sqrt(MANY / items):
        return MANY
    return max(items, math.ceil(items * (half / distance) ** 2))


def _normal(level: float) -> float:
    return float(ndtri(0.5 + level / 2))


def _numbers(values: Any) -> Numbers:
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(numbers) < 2:
        raise DataError(
            f"{len(numbers)} samples have no interval", why="a spread needs two", fix="give more test samples"
        )
    if np.isnan(numbers).any():
        raise NumericsError("NaN among the per-sample numbers", where=f"sample {int(np.isnan(numbers).argmax())}")
    return numbers


def _is_binary(numbers: Numbers) -> bool:
    return bool(np.isin(numbers, (0.0, 1.0)).all())
