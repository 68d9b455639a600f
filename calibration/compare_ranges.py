"""How far the ranges of one set of samples are from those of another, tensor by tensor.

ratio = amax of the one / amax of the other          1: the same scale; 0.5: values above one half are clipped
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

_SHOWN = 5


@dataclass(frozen=True)
class RangeComparison:
    """The ratios of the ranges `of` one set of samples to those of another, `to`, by tensor; in graph order."""

    of: str
    to: str
    ratios: Mapping[str, float]

    @property
    def median_ratio(self) -> float:
        """Below 1 the first set's ranges are the smaller ones; 1 where nothing can be compared."""
        return median(self.ratios.values()) if self.ratios else 1.0

    @property
    def median_factor(self) -> float:
        """The median of how many times a range is too wide or too narrow: 1 and more."""
        return median(_factor(ratio) for ratio in self.ratios.values()) if self.ratios else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data with a row for each tensor."""
        return {
            "of": self.of,
            "to": self.to,
            "tensors": len(self.ratios),
            "median_ratio": self.median_ratio,
            "median_factor": self.median_factor,
            "ratios": dict(self.ratios),
        }

    def to_text(self) -> str:
        """A sentence, and the tensors that differ most."""
        worst = sorted(self.ratios.items(), key=lambda item: -_factor(item[1]))[:_SHOWN]
        head = (
            f"ranges of {self.of} are {self.median_ratio:.2f} × those of {self.to} (median of {len(self.ratios)} "
            f"tensors; off by a factor of {self.median_factor:.2f})"
        )
        return "\n".join([head, *(f"  {ratio:7.3f} ×  {name}" for name, ratio in worst)])


def compare_ranges(
    ranges: Mapping[str, float], others: Mapping[str, float], *, of: str = "synthetic samples", to: str = "real samples"
) -> RangeComparison:
    """Compare amax by tensor, {tensor: amax}, where both have it and neither is 0."""
    ratios = {name: amax / others[name] for name, amax in ranges.items() if amax > 0 and others.get(name, 0) > 0}
    return RangeComparison(of, to, ratios)


def _factor(ratio: float) -> float:
    return math.exp(abs(math.log(ratio)))
