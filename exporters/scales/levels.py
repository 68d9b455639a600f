"""Low-bit weights that nobody labelled: floats with a handful of levels in each channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from exporters.scales.taken import Array, widened

MOST = 16
_DIVISORS = range(1, 9)
_TOLERANCE = 4.0  # of the type's own rounding, for each step away from 0


@dataclass(frozen=True)
class Levels:
    """The levels of a weight.

    Attributes:
        count: the largest number of different values in one channel.
        uniform: whether each channel's values are integers times one step.
        scale: float32 [channels], that step, 1 for a channel of zeros; None unless `uniform`.
    """

    count: int
    uniform: bool
    scale: Array | None = None


def levels_of(weight: torch.Tensor) -> Levels | None:
    """Return the levels of a float weight [N, …]; None where some channel has more than 16."""
    if not weight.is_floating_point() or weight.ndim < 2 or weight.numel() == 0:
        return None
    rows = widened(weight).reshape(len(weight), -1)
    if len(np.unique(rows[0])) > MOST:
        return None
    ordered = np.sort(rows, axis=1)
    count = int((np.diff(ordered, axis=1) != 0).sum(axis=1).max(initial=0)) + 1
    if count > MOST:
        return None
    steps = [_step(np.unique(row), torch.finfo(weight.dtype).eps) for row in rows]
    if any(step is None for step in steps):
        return Levels(count, uniform=False)
    return Levels(count, uniform=True, scale=np.array(steps, np.float32))


def _step(values: Array, eps: float) -> float | None:
    """The largest step of which all `values` are multiples by at most 16; None where there is none."""
    wide = values.astype(np.float64)
    if not wide.any():
        return 1.0
    gaps = np.diff(np.unique(np.concatenate([wide, [0.0]])))
    for divisor in _DIVISORS:
        multiples = wide / (gaps.min() / divisor)
        nearest = np.rint(multiples)
        if (np.abs(nearest) <= MOST).all() and (np.abs(multiples - nearest) <= _TOLERANCE * eps * MOST).all():
            largest = np.abs(nearest).argmax()
            return float(wide[largest] / nearest[largest])
    return None
