"""What stands at padding counts for nothing: no range, no statistic is measured there.

A text that is shorter than its batch is filled up, and `attention_mask` [N, T] is 0 there. The network computes on all
positions and reads the answers of the others alone; what padding reaches would widen ranges for nobody's good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
MASK = "attention_mask"


def without_padded(array: Array, feed: Mapping[str, Array]) -> Array:
    """The elements of `array` [N, T, …] at positions that the mask [N, T] of `feed` keeps; any other array as it is."""
    mask = feed.get(MASK)
    if mask is None or array.ndim <= mask.ndim or array.shape[: mask.ndim] != mask.shape or mask.all():
        return array
    return np.asarray(array[mask != 0])


def mask_of(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """The mask [N, T] that is an input of `graph`, if `value` is [N, T, …] by the shapes that are known."""
    mask = next((given for given in graph.inputs if given.name == MASK), None)
    if mask is None or mask.shape is None or value.shape is None or len(value.shape) <= len(mask.shape):
        return None
    return mask if all(map(_may_equal, mask.shape, list(value.shape)[: len(mask.shape)])) else None


def _may_equal(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two lengths are the same; of the number of samples, two names that may stand for it."""
    if isinstance(one, ir.SymbolicDim) and isinstance(other, ir.SymbolicDim):
        return True
    return one == other
