"""From the histogram of a tensor's magnitudes to amax, the largest magnitude that its INT8 scale amax / 127 keeps.

| method | amax |
|---|---|
| max | the largest value: nothing is clipped |
| percentile | the value below which a given share of all values lies |
| entropy | where the clipped and quantized distribution diverges least from the original one (Kullback and Leibler) |
| mse | where the mean square of the quantization error is least |
| least-loss | for each tensor that of these which loses least of what the model answers (exporters/range_choice.py) |

Entropy is as in S. Migacz, *8-bit Inference with TensorRT*, GTC 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.histogram import Histogram
from calibration.method_names import PERCENTILE, MethodName

_LEVELS = 127
_LINEAR_BINS = 2048
_MOST_CLIPPED = 1e-3
_POSITIVE_LEVELS = 128  # into which the method of Migacz quantizes the magnitudes
_TRIED_OCTAVES = 5
_TRIED_PER_OCTAVE = 64

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """How amax is found; `percentile`, in %, matters for the method of that name alone."""

    name: MethodName = "max"
    percentile: float = PERCENTILE

    def __call__(self, histogram: Histogram) -> float:
        """Return amax of what the histogram counted; 0 where that was nothing but zeros.

        Raises:
            ValueError: a histogram alone does not tell which method loses least.
        """
        if self.name == "least-loss":
            raise ValueError("least-loss needs the model: choose a method for each tensor first")
        if self.name == "max" or not histogram.amax:
            return histogram.amax
        if self.name == "percentile":
            return at_percentile(histogram, self.percentile)
        return least_divergent(histogram) if self.name == "entropy" else least_square_error(histogram)

    def __str__(self) -> str:
        return f"percentile {self.percentile:g}" if self.name == "percentile" else self.name


CHOICES = (Method(), Method("percentile"), Method("percentile", 99.999), Method("entropy"), Method("mse"))
"""What least-loss chooses among."""


def at_percentile(histogram: Histogram, percent: float) -> float:
    """The upper edge of the bin that holds the value below which `percent` % of all values lie, at most amax."""
    counts = np.cumsum(histogram.counts)
    index = int(np.searchsorted(counts, percent / 100 * counts[-1]))
    return min(float(histogram.edges[index + 1]), histogram.amax)


def least_square_error(histogram: Histogram) -> float:
    """The candidate amax with the least mean square error of rounding to ±127 steps and clipping.

    The candidates are the largest value and what lies up to five octaves below it, 64 in each octave.
    """
    tried = histogram.amax * 2.0 ** -(np.arange(_TRIED_OCTAVES * _TRIED_PER_OCTAVE + 1) / _TRIED_PER_OCTAVE)
    return float(tried[np.argmin(_square_errors(histogram, tried / _LEVELS))])


def _square_errors(histogram: Histogram, scales: Array) -> Array:
    """Σ (x − k·s)² for each scale s, [len(scales)], where k of 0 … 127 is the level nearest to x.

    The sum over a level is Σx² − 2ks·Σx + (ks)²·Σ1, each taken from cumulative sums between the level's ends.
    """
    x = histogram.centers
    moments = [_cumulative(histogram.counts * x**power) for power in range(3)]
    levels = np.arange(_LEVELS + 1) * scales[:, None]  # [scales, 128]
    ends = np.searchsorted(x, levels[:, :-1] + scales[:, None] / 2)
    places = np.pad(ends, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(x))))
    count, total, squares = (np.diff(moment[places]) for moment in moments)
    errors: Array = (squares - 2 * levels * total + levels**2 * count).sum(axis=1)
    return errors


def least_divergent(histogram: Histogram) -> float:
    """The end of the linear bin at which the Kullback-Leibler divergence is least, at most amax.

    The linear bins are 2048 between 0 and the power of two above amax, whose edges are edges of the histogram's own
    bins, so that they count exactly. For each end i from 128 on: P is the first i bins with all that lies beyond added
    to the last; Q is the first i bins, quantized: of each 128th part the mean over its bins that are not empty. The bin
    at 0 counts as its neighbour does, so that what a ReLU cut off does not decide. Ends that clip more than 0.1 % of
    the values are not tried: where many values are equal, as behind a ReLU6, the divergence prefers a range that is 128
    bins long to any right one. Numbers below the normal ones of float32 fill fewer than 128 bins: of them nothing is
    clipped.
    """
    counts, width = _linear(histogram)
    if len(counts) < _POSITIVE_LEVELS:
        return histogram.amax
    within = np.append(0.0, np.cumsum(counts)) / counts.sum()  # the share before each end
    ends = np.arange(_POSITIVE_LEVELS, len(counts) + 1)
    ends = ends[within[ends] >= 1 - _MOST_CLIPPED]
    counts[0] = counts[1]
    return min(float(ends[np.argmin(_divergences(counts, ends))] * width), histogram.amax)


def _linear(histogram: Histogram) -> tuple[Array, float]:
    """The counts in bins of equal width, up to the one that holds amax, and that width."""
    edges = histogram.edges
    width = float(edges[-1]) / _LINEAR_BINS
    bins = np.minimum(edges[:-1] / width, _LINEAR_BINS - 1).astype(np.int64)
    counts = np.bincount(bins, histogram.counts).astype(np.float64)
    return counts[: int(histogram.amax / width) + 1], width


def _divergences(counts: Array, ends: npt.NDArray[np.int64]) -> Array:
    """KL(P ‖ Q) for each end, [len(ends)], both normalised to 1.

    With the bins' cumulative sums every end costs 128 look-ups: KL = Σ p·log p − Σ p·log q, where q is the same for all
    bins of a level, so that the second sum needs P's mass of each level alone.
    """
    total = counts.sum()
    mass, filled = _cumulative(counts), _cumulative(counts > 0)
    own = _cumulative(_times_log(counts))
    levels = np.arange(_POSITIVE_LEVELS + 1) * ends[:, None] // _POSITIVE_LEVELS  # [ends, 129]: where each begins
    inside, of_level, bins = mass[ends], np.diff(mass[levels]), np.diff(filled[levels])
    last, beyond = counts[ends - 1], total - mass[ends]
    p_log_p = own[ends] - _times_log(last) + _times_log(last + beyond)
    q = np.divide(of_level, bins, out=np.ones_like(of_level), where=bins > 0)
    p_of_level = of_level.copy()
    p_of_level[:, -1] += beyond
    with np.errstate(divide="ignore"):
        log_q = np.where(q > 0, np.log(q), 0.0)
    p_log_q = (p_of_level * log_q).sum(axis=1)
    found: Array = (p_log_p - p_log_q) / total - np.log(total) + np.log(inside)
    return np.where(last > 0, found, np.inf)


def _cumulative(values: npt.NDArray[np.generic]) -> Array:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _times_log(values: Array) -> Array:
    found: Array = values * np.log(np.where(values > 0, values, 1.0))
    return found
