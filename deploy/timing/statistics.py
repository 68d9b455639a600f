"""The statistics of timings: percentiles by trtexec's rule, paired ratios with intervals, several metrics at once.

Ratios are taken pair by pair and on the log scale, so that twice as fast and half as fast are equally far from 1, and
a machine that drifts during the run cancels out. Neighbouring pairs are alike (a neighbour's load lasts longer than a
call), so the bootstrap draws blocks of them: with single pairs it would be too sure (Künsch 1989, the block bootstrap;
circular, Politis and Romano 1992). The length of a block is N^(1/3).

With b blocks the bootstrap's spread is too narrow, as a standard deviation with divisor b instead of b − 1 and a normal
quantile instead of Student's are: resampled values are stretched around the figure by √(b/(b−1)) · t(b−1)/z. For 200
pairs that is 6 %, for ten windows of throughput 58 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.manifest import Interval

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], Array]

_AT_ONCE = 100
_MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        resamples: drawn by the bootstrap.
        confidence: of the two-sided intervals.
        seed: of the draws.
    """

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


def percentile(samples: Array, p: float) -> Array:
    """The p-th percentile of the last axis by trtexec's rule (sampleReporting.cpp).

    Of N sorted samples it is the one at max(N − 1 − int((1 − p/100) · N), 0).
    """
    count = samples.shape[-1]
    index = max(count - 1 - int((1 - p / 100) * count), 0)
    return np.partition(samples, index, axis=-1)[..., index]


def median(samples: Array) -> Array:
    """The 50th percentile of the last axis."""
    return percentile(samples, 50)


def p99(samples: Array) -> Array:
    """The 99th percentile of the last axis."""
    return percentile(samples, 99)


def block_length(count: int) -> int:
    """How many samples in a row are drawn together."""
    return max(1, round(float(np.cbrt(count))))


def draws(count: int, how: Resampling) -> npt.NDArray[np.int64]:
    """Indices of the resamples of `count` samples in a row, [resamples, count]: blocks around a circle."""
    length = block_length(count)
    blocks = -(-count // length)
    starts = np.random.default_rng(how.seed).integers(0, count, (how.resamples, blocks, 1))
    return ((starts + np.arange(length)) % count).reshape(how.resamples, -1)[:, :count]


def resampled(samples: Sequence[Array], statistic: Callable[..., Array], how: Resampling) -> Array:
    """`statistic` of every resample, [resamples]; the same pairs are drawn of each of `samples`, [pairs]."""
    indices = draws(len(samples[0]), how)
    parts = np.array_split(indices, max(1, len(indices) // _AT_ONCE))
    return np.concatenate([statistic(*(values[part] for values in samples)) for part in parts])


def stretched(value: float, found: Array, count: int, how: Resampling) -> Array:
    """The resampled values `found` of `count` samples, as far from `value` as so few blocks ask for."""
    from scipy.stats import norm, t

    blocks = count / block_length(count)
    if blocks <= 1:
        return found
    upper = (1 + how.confidence) / 2
    factor = math.sqrt(blocks / (blocks - 1)) * float(t.ppf(upper, blocks - 1) / norm.ppf(upper))
    return value + factor * (found - value)


def interval(samples: Array, statistic: Statistic, how: Resampling | None = None) -> Interval:
    """`statistic` of `samples` [N] with its percentile-bootstrap interval."""
    how = how or Resampling()
    value = float(statistic(samples))
    return as_interval(value, stretched(value, resampled([samples], statistic, how), len(samples), how), how)


def as_interval(value: float, found: Array, how: Resampling) -> Interval:
    """`value` with the interval that holds the middle of the resampled values `found`."""
    tail = (1 - how.confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high))


def log_ratio(above: Array, below: Array, how: Resampling | None = None) -> Interval:
    """The median over pairs of log(above / below), with its interval.

    Args:
        above: samples [pairs], positive.
        below: samples of the same pairs, [pairs], positive.
        how: how the interval is made.
    """
    return interval(np.log(above / below), median, how)


def exponential(of: Interval) -> Interval:
    """An interval of logs as one of ratios."""
    return Interval(value=math.exp(of.value), low=math.exp(of.low), high=math.exp(of.high))


def pairs_to_decide(found: Interval, limit: float, pairs: int) -> int | None:
    """How many more pairs bring an interval off `limit`, if the figure stays where it is.

    The width of an interval falls with √N: N' = N · (half-width / distance)². None where the figure lies on the limit,
    or more than a million pairs would be needed.
    """
    distance = abs(found.value - limit)
    width = found.high - found.value if found.value < limit else found.value - found.low
    if distance == 0 or width <= 0:
        return None
    needed = math.ceil(pairs * (width / distance) ** 2) - pairs
    return max(needed, 1) if needed < _MOST_PAIRS else None


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, in the order given (Holm 1979, step-down).

    The k-th smallest of m is multiplied by m − k + 1; none becomes smaller than the one before it, nor larger than 1.
    """
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
