"""An array slice by slice, so that what is computed of it stays small and a mapped file is never in memory whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

VALUES = 1 << 20  # of a slice; a few arrays of them stay in the processor's cache


def flat_slices(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield views of the values of a contiguous `array`, in its order; nothing where it is empty."""
    flat = array.reshape(-1)
    return (flat[start : start + VALUES] for start in range(0, flat.size, VALUES))


def cuts(shape: tuple[int, ...], axis: int) -> Iterator[tuple[slice, ...]]:
    """Yield the indices that cut an array of `shape` along `axis` into parts of about `VALUES` values."""
    step = max(1, VALUES * shape[axis] // max(1, int(np.prod(shape))))
    before = (slice(None),) * axis
    return ((*before, slice(start, start + step)) for start in range(0, shape[axis], step))
