"""How far the scales of a weight reach: to its largest magnitude, or to where the rounding error is the least.

    scale = amax / high,   q = clip(round(w / scale), low, high)

    max:  amax = max |w|,                   of four bits max(max w, −min w · 7/8)
    mse:  amax = r · that,                  r of a grid that minimizes Σ h · (q · scale − w)²

Four bits reach from −8 to 7: a block whose extreme is negative needs a scale that is smaller by an eighth. With eight
bits that would be worth nothing. h is 1, or what an error counts for: the mean square of what the value is multiplied
by. A zero of the weight is a zero whatever the scale, so only what pruning kept decides, and 2:4 masks stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

WeightMethod = Literal["max", "mse"]
Float = npt.NDArray[np.float32]
_RATIOS = {4: np.linspace(0.5, 1.0, 26), 8: np.linspace(0.7, 1.0, 16)}  # the last is max itself
_INT4_HIGH = 7
_PART = 1 << 22  # values whose error is computed at once


def weight_amax(
    values: npt.NDArray[Any],
    axis: int | None,
    block: int = 0,
    *,
    low: int = -128,
    high: int = 127,
    method: WeightMethod = "max",
    importance: npt.NDArray[Any] | None = None,
) -> Float:
    """Return the magnitude that the largest integer stands for, for each channel, block or the whole weight.

    Args:
        values: the weight, of any float type.
        axis: of the channels, or of the blocks; None for one scale.
        block: length of the blocks along `axis`, a divisor of it; 0 where there are none.
        low: the smallest integer.
        high: the largest integer.
        method: `max`, or `mse` for the least squared error.
        importance: what a squared error counts for, of the weight's shape; None: the same everywhere.

    Returns:
        float32 [], [channels], or the weight's shape with `axis` divided by `block`; 0 where there are only zeros.
    """
    counts = None if importance is None else np.broadcast_to(importance, values.shape)

    def of(rows: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Float:
        return _of_rows(rows(values), None if counts is None else rows(counts), low, high, method)

    if axis is None:
        return np.asarray(of(lambda x: x.reshape(1, -1))[0], np.float32)
    if not block:
        return of(lambda x: np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1))
    found = of(lambda x: np.moveaxis(x, axis, -1).reshape(-1, block))
    shape = np.moveaxis(values, axis, -1).shape[:-1]
    return np.asarray(np.moveaxis(found.reshape(*shape, -1), -1, axis), np.float32)


def _of_rows(
    rows: npt.NDArray[Any], counts: npt.NDArray[Any] | None, low: int, high: int, method: WeightMethod
) -> Float:
    below = high / -low if high <= _INT4_HIGH else 1
    largest = np.asarray(np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0) * below), np.float32)
    if method == "max" or not np.isfinite(largest).all():
        return largest
    step = max(1, _PART // max(rows.shape[1], 1))
    parts = [
        _least_error(
            rows[at : at + step], None if counts is None else counts[at : at + step], largest[at : at + step], low, high
        )
        for at in range(0, len(rows), step)
    ]
    return np.concatenate(parts) if parts else largest


def _least_error(rows: npt.NDArray[Any], counts: npt.NDArray[Any] | None, largest: Float, low: int, high: int) -> Float:
    """The amax of each row whose squared error is the least; the larger one of equals."""
    w = rows.astype(np.float32)
    best, least = largest.copy(), np.full(len(w), np.inf, np.float32)
    for ratio in _RATIOS[4 if high <= _INT4_HIGH else 8][::-1]:
        amax = (largest * ratio).astype(np.float32)
        scale = np.where(amax > 0, amax, 1)[:, None] / np.float32(high)
        square = np.square(np.clip(np.rint(w / scale), low, high) * scale - w)
        error = (square if counts is None else square * counts).sum(axis=1)
        best, least = np.where(error < least, amax, best), np.minimum(error, least)
    return best
