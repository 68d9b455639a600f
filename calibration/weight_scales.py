"""How far the scales of a weight reach: to its largest magnitude, or to where the rounding error is the least.

    scale = amax / high,   q = clip(round(w / scale), low, high)

    max:  amax = max |w|
    mse:  amax = r · max |w|,   r of a grid that minimizes Σ (q · scale − w)²

A zero of the weight is a zero whatever the scale, so only what pruning kept decides, and 2:4 masks stay.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

WeightMethod = Literal["max", "mse"]
Float = npt.NDArray[np.float32]
_RATIOS = {4: np.linspace(0.5, 1.0, 26), 8: np.linspace(0.7, 1.0, 16)}  # the last is max itself
_PART = 1 << 22  # values whose error is computed at once


def weight_amax(
    values: npt.NDArray[Any],
    axis: int | None,
    block: int = 0,
    *,
    low: int = -128,
    high: int = 127,
    method: WeightMethod = "max",
) -> Float:
    """Return the magnitude that the largest integer stands for, for each channel, block or the whole weight.

    Args:
        values: the weight, of any float type.
        axis: of the channels, or of the blocks; None for one scale.
        block: length of the blocks along `axis`, a divisor of it; 0 where there are none.
        low: the smallest integer.
        high: the largest integer.
        method: `max`, or `mse` for the least squared error.

    Returns:
        float32 [], [channels], or the weight's shape with `axis` divided by `block`; 0 where there are only zeros.
    """
    if axis is None:
        return np.asarray(_of_rows(values.reshape(1, -1), low, high, method)[0], np.float32)
    if not block:
        return _of_rows(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1), low, high, method)
    moved = np.moveaxis(values, axis, -1)
    found = _of_rows(moved.reshape(-1, block), low, high, method)
    return np.moveaxis(found.reshape(*moved.shape[:-1], -1), -1, axis)


def _of_rows(rows: npt.NDArray[Any], low: int, high: int, method: WeightMethod) -> Float:
    largest = np.asarray(np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0)), np.float32)
    if method == "max" or not np.isfinite(largest).all():
        return largest
    step = max(1, _PART // max(rows.shape[1], 1))
    starts = range(0, len(rows), step)
    parts = [_least_error(rows[at : at + step], largest[at : at + step], low, high) for at in starts]
    return np.concatenate(parts) if parts else largest


def _least_error(rows: npt.NDArray[Any], largest: Float, low: int, high: int) -> Float:
    """The amax of each row whose squared error is the least; the larger one of equals."""
    w = rows.astype(np.float32)
    best, least = largest.copy(), np.full(len(w), np.inf, np.float32)
    for ratio in _RATIOS[4 if high < 8 else 8][::-1]:
        amax = (largest * ratio).astype(np.float32)
        scale = np.where(amax > 0, amax, 1)[:, None] / np.float32(high)
        error = np.square(np.clip(np.rint(w / scale), low, high) * scale - w).sum(axis=1)
        best, least = np.where(error < least, amax, best), np.minimum(error, least)
    return best
