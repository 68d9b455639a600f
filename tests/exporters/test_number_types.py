from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.number_types import holds

T = ir.DataType
NUMBERS = [T.BOOL, T.INT8, T.INT16, T.INT32, T.INT64, T.UINT8, T.UINT16, T.UINT32, T.UINT64, T.FLOAT16, T.FLOAT]
NUMBERS += [T.BFLOAT16, T.DOUBLE]


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (T.FLOAT, T.FLOAT16),
        (T.FLOAT, T.BFLOAT16),
        (T.DOUBLE, T.INT32),
        (T.FLOAT16, T.UINT8),
        (T.INT64, T.UINT32),
        (T.INT8, T.BOOL),
    ],
)
def test_holds_every_number(wide: ir.DataType, narrow: ir.DataType) -> None:
    assert holds(wide, narrow)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (T.FLOAT16, T.FLOAT),
        (T.BFLOAT16, T.FLOAT16),
        (T.FLOAT16, T.BFLOAT16),
        (T.FLOAT, T.INT32),
        (T.DOUBLE, T.INT64),
        (T.FLOAT16, T.UINT16),
        (T.UINT64, T.INT8),
        (T.INT32, T.UINT32),
        (T.INT64, T.FLOAT),
        (T.BOOL, T.INT8),
        (T.STRING, T.INT8),
        (T.FLOAT, T.STRING),
    ],
)
def test_does_not_hold_every_number(wide: ir.DataType, narrow: ir.DataType) -> None:
    assert not holds(wide, narrow)


@given(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), st.integers(0, 2**64 - 1))
def test_a_cast_and_back_keeps_every_bit(wide: ir.DataType, narrow: ir.DataType, bits: int) -> None:
    size = np.dtype(narrow.numpy()).itemsize
    if not holds(wide, narrow):
        return
    number = np.frombuffer((bits & 1 if narrow == T.BOOL else bits).to_bytes(8, "little")[:size], narrow.numpy())
    if np.isfinite(number.astype(np.float64)).all():
        assert number.astype(wide.numpy()).astype(narrow.numpy()).tobytes() == number.tobytes()
