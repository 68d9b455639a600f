from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from exporters.quantizer import E4M3, Quantizer
from exporters.small_floats import BLOCK, NVFP4_MAX, block_scales, fp4_codes

Float = npt.NDArray[np.float32]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = arrays(np.float32, (3, 2 * BLOCK), elements=st.floats(-100, 100, width=32))


def dequantized(values: Float, axis: int) -> tuple[Float, Float]:
    """The values as NVFP4 holds them, and the step of the block that each lies in."""
    g = float(np.float32(np.abs(values).max() / NVFP4_MAX))
    scales = block_scales(values, g, axis).astype(np.float32) * np.float32(g)
    step = np.repeat(scales, BLOCK, axis=axis)
    return fp4_codes(values, g, axis).astype(np.float32) * step, step


@settings(deadline=None)
@given(VALUES.filter(lambda values: np.abs(values).max() > 1e-20))
def test_a_value_is_within_the_half_step_of_its_size(values: Float) -> None:
    """Steps are 0.5 below 2, 1 below 4, 2 below 6; above 6 a value is cut off by what E4M3 took from its scale."""
    found, scale = dequantized(values, 1)
    size = np.abs(values) / scale
    half = np.where(size < 2, 0.25, np.where(size < 4, 0.5, 1.0))
    short = np.maximum(scale / 16, 2.0**-10 * np.abs(values).max() / NVFP4_MAX)  # half a step of the scale
    bound = np.where(size > 6, 6 * short, half * scale)
    assert (np.abs(found - values) <= bound * (1 + 1e-5)).all()


def test_the_largest_of_a_small_block_is_cut_off() -> None:
    """Beside a large block the scale of a small one is a subnormal E4M3 number."""
    values = np.zeros((1, 2 * BLOCK), np.float32)
    values[0, 0], values[0, BLOCK] = 2688, 6 * 1.4 * 2.0**-9
    found, scale = dequantized(values, 1)
    assert scale[0, BLOCK] == 2.0**-9
    assert found[0, BLOCK] == 6 * 2.0**-9


@settings(deadline=None)
@given(VALUES.filter(lambda values: np.abs(values).max() > 1e-20))
def test_blocks_lie_along_the_axis_that_is_given(values: Float) -> None:
    across, _ = dequantized(np.ascontiguousarray(values.T), 0)
    assert np.array_equal(across.T, dequantized(values, 1)[0])


def test_numbers_of_the_grid_are_kept() -> None:
    values = np.concatenate([E2M1, -E2M1])[None] * np.float32(448)
    found, scale = dequantized(values, 1)
    assert np.array_equal(found, values)
    assert (scale == 448).all()


def test_a_block_of_zeros_stays_one() -> None:
    values = np.zeros((1, 2 * BLOCK), np.float32)
    values[0, 0] = 3
    found, _ = dequantized(values, 1)
    assert np.array_equal(found, values)


@settings(deadline=None)
@given(VALUES, st.floats(0.01, 2))
def test_8_bit_floats_are_rounded_as_their_type_is(values: Float, scale: float) -> None:
    quantizer = Quantizer(np.full(3, scale, np.float32), axis=0, low=E4M3[0], high=E4M3[1], grid="e4m3")
    stored = quantizer.stored(values, ml_dtypes.float8_e4m3fn)
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    ratio = np.clip(values / np.float32(scale), -448, 448)
    assert np.array_equal(stored.astype(np.float32), ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
