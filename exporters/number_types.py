"""Which number types hold every number of another."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
_SIGNED = (ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64)
_UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64)


def holds(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Whether every number of type `narrow` is one of type `wide`, so that a cast through `wide` changes nothing."""
    if wide == narrow:
        return True
    if narrow == ir.DataType.BOOL:
        return wide in _FLOATS + _SIGNED + _UNSIGNED
    if narrow in _FLOATS:
        return wide in _FLOATS and _holds_float(wide, narrow)
    if narrow not in _SIGNED + _UNSIGNED:
        return False
    if wide in _FLOATS:
        info = ml_dtypes.finfo(wide.numpy())  # type: ignore[no-untyped-call]
        return _bits(narrow) <= info.nmant + 1 and _bits(narrow) < info.maxexp
    if wide in _SIGNED:
        return _bits(narrow) <= _bits(wide)
    return wide in _UNSIGNED and narrow in _UNSIGNED and _bits(narrow) <= _bits(wide)


def _holds_float(wide: ir.DataType, narrow: ir.DataType) -> bool:
    outer, inner = (ml_dtypes.finfo(dtype.numpy()) for dtype in (wide, narrow))  # type: ignore[no-untyped-call]
    return bool(outer.nmant >= inner.nmant and outer.maxexp >= inner.maxexp)


def _bits(dtype: ir.DataType) -> int:
    """Bits of the magnitude."""
    return int(np.iinfo(dtype.numpy()).bits) - (dtype in _SIGNED)
