"""Find NaN and infinity in the weights, in slices, so that a mapped file never lies in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.derived_tensor import release
from exporters.slices import flat_slices


def not_finite(graph: ir.Graph) -> Iterator[str]:
    """Yield what is wrong with each float initializer that holds NaN, or infinity outside a mask.

    A constant of nothing but zeros, ones and infinities is a mask or a bound: attention adds -inf where it must not
    look.
    """
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        trouble = _trouble(np.asarray(tensor.numpy()))
        release(tensor)
        if trouble:
            yield f"initializer {name!r} holds {trouble}"


def _trouble(array: npt.NDArray[Any]) -> str:
    bad = [part[~finite] for part in flat_slices(array) if not (finite := _is_finite(part)).all()]
    if any(np.isnan(values.astype(np.float64)).any() for values in bad):
        return "NaN"
    return "infinity" if bad and any(_holds_weights(part) for part in flat_slices(array)) else ""


def _holds_weights(part: npt.NDArray[Any]) -> bool:
    return bool(((part != 0) & (part != 1) & _is_finite(part)).any())


def _is_finite(part: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if part.dtype in (ml_dtypes.float4_e2m1fn, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn):
        return np.ones(part.shape, np.bool_)
    return np.asarray(np.isfinite(part))
