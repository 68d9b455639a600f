"""A histogram of magnitudes whose bins are as fine for small values as for large ones, and that grows with its range.

A bin is a stretch of float32 numbers: those that share the exponent and the first 11 bits of the mantissa. So every
octave has 2048 bins, a bin is at most 2⁻¹¹ of its value wide, and a value finds its bin by dropping bits:

    sign exponent mantissa                     0|10000010|10110100110|101100010111   13.65…
                                               └─ bin: 130 · 2048 + 1446 ────┘

Bins are kept for the 16 octaves below the largest value seen; what lies below them, less than a five-hundredth of an
INT8 step, is counted in one. When a larger value comes, the window moves up. The counts depend therefore on the values
alone, and not on the order or the parts in which they came: parts merge without loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

OCTAVES = 16
PER_OCTAVE = 2048
_DROPPED = 12  # of the 23 bits of the mantissa
_EXPONENT = 23
_INFINITE = 255
_BLOCK = 1 << 17  # values at a time: they stay in the second-level cache


@dataclass
class Histogram:
    """Counts of |x|.

    Attributes:
        counts: int64 [1 + OCTAVES · PER_OCTAVE]; the first is of all that lies below the window, zero among it.
        bits: the largest |x| as the bits of a float32; those of infinity or NaN where there was one.
    """

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 + OCTAVES * PER_OCTAVE, np.int64))
    bits: int = 0

    @property
    def amax(self) -> float:
        """The largest |x|, exactly."""
        return float(np.array(self.bits, np.uint32).view(np.float32))

    @property
    def finite(self) -> bool:
        """Whether no value was infinite or NaN."""
        return self.bits >> _EXPONENT < _INFINITE

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """Where the bins begin and the last one ends: float64 [len(counts) + 1], the first of them 0."""
        codes = _first_code(self.bits) + np.arange(len(self.counts), dtype=np.int64)
        return np.concatenate([[0.0], (codes << _DROPPED).astype(np.uint32).view(np.float32).astype(np.float64)])

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """The values that the bins stand for: their middles, float64 [len(counts)]; 0 for what lies below."""
        edges = self.edges
        centers = (edges[:-1] + edges[1:]) / 2
        centers[0] = 0
        return centers

    @property
    def rms(self) -> float:
        """The root of the mean square, to within 2⁻¹²."""
        return float(np.sqrt(self.counts @ self.centers**2 / max(self.count, 1)))

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count the float values of an array of any shape; those of other types than float32 are cast to it."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
        for start in range(0, flat.size, _BLOCK):
            self._count(flat[start : start + _BLOCK] << np.uint32(1))

    def merge(self, other: Histogram) -> None:
        """Add what another one counted."""
        self._rise(other.bits)
        moved = _moved(other.counts, _first_code(self.bits) - _first_code(other.bits))
        self.counts += moved

    def _count(self, magnitudes: npt.NDArray[np.uint32]) -> None:
        """Count magnitudes that are given as bits shifted up by the one of the sign."""
        self._rise(int(magnitudes.max()) >> 1)
        if not self.finite:
            return
        magnitudes >>= np.uint32(_DROPPED + 1)
        codes = magnitudes.view(np.int32)
        codes -= np.int32(_first_code(self.bits) - 1)
        np.maximum(codes, 0, out=codes)
        self.counts += np.bincount(codes, minlength=len(self.counts))

    def _rise(self, bits: int) -> None:
        """Move the window up to where it holds a value with these bits."""
        if bits > self.bits:
            self.counts = _moved(self.counts, _first_code(bits) - _first_code(self.bits))
            self.bits = bits


def merged(parts: Iterable[Histogram]) -> Histogram:
    """The histogram of all that the parts counted."""
    whole = Histogram()
    for part in parts:
        whole.merge(part)
    return whole


def _first_code(bits: int) -> int:
    """The first bin of the window whose largest value has these bits."""
    return max((bits >> _EXPONENT) - OCTAVES + 1, 0) * PER_OCTAVE


def _moved(counts: npt.NDArray[np.int64], bins: int) -> npt.NDArray[np.int64]:
    """The counts in a window that begins `bins` later."""
    if not bins:
        return counts
    moved = np.zeros_like(counts)
    moved[0] = counts[: bins + 1].sum()
    kept = counts[bins + 1 :]
    moved[1 : 1 + len(kept)] = kept
    return moved
