"""NVFP4: 4-bit floats (E2M1) in blocks of 16, each with an 8-bit float (E4M3) as its scale, times one float32.

    x ≈ q · s[block] · g,    g = amax / (6 · 448),    s = E4M3(amax[block] / (6 · g)),    q = E2M1(x / (s · g))

E2M1 has the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; the largest of a block becomes 6, the largest
s of a tensor 448. (Source: NVIDIA, "Introducing NVFP4"; TensorRT, quantized types, and its TRT_FP4DynamicQuantize.)
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
NVFP4_MAX = E2M1_MAX * E4M3_MAX
"""What the amax of a tensor is divided by to make its scale g."""
_SMALLEST_SCALE = 2.0**-9  # of E4M3, so that a block of small numbers is not divided by 0

Array = npt.NDArray[Any]


def block_scales(values: Array, scale: float, axis: int) -> Array:
    """The E4M3 scales of the blocks along `axis` of `values`; the shape of `values` with `axis` divided by 16."""
    amax = np.abs(_blocks(values, axis)).max(axis=-1) / np.float32(E2M1_MAX * scale)
    found = np.clip(amax, _SMALLEST_SCALE, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return np.ascontiguousarray(np.moveaxis(found, -1, axis))


def fp4_codes(values: Array, scale: float, axis: int) -> Array:
    """The E2M1 numbers of `values`, of the same shape."""
    blocks = _blocks(values, axis)
    steps = np.moveaxis(block_scales(values, scale, axis), axis, -1).astype(np.float32) * np.float32(scale)
    scaled = np.clip(blocks / steps[..., None], -E2M1_MAX, E2M1_MAX)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).reshape(*blocks.shape[:-2], -1)
    return np.ascontiguousarray(np.moveaxis(codes, -1, axis))


def _blocks(values: Array, axis: int) -> npt.NDArray[np.float32]:
    """[..., blocks, 16] with `axis` last."""
    moved = np.moveaxis(values.astype(np.float32, copy=False), axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, BLOCK)
