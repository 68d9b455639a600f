"""A tensor that is computed from others each time it is read, and never held: one weight at a time is in memory.

    W, float32, in a file  ─►  derived_tensor(W → W.astype(float16))  ─►  read: W is mapped, converted, unmapped

A pass that rewrites weights leaves such tensors in the graph; what they say is worked out when the graph is written.
They may be derived from one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def derived_tensor(
    sources: Sequence[ir.TensorProtocol],
    compute: Callable[..., Array],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str | None = None,
) -> ir.LazyTensor:
    """Return the tensor of `dtype` and `shape` that `compute` makes of the arrays of `sources`."""

    def evaluate() -> ir.TensorProtocol:
        array = compute(*(np.asarray(source.numpy()) for source in sources))
        for source in sources:
            release(source)
        return ir.Tensor(array, dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name)


def release(tensor: ir.TensorProtocol | None) -> None:
    """Unmap a tensor that lies in a file, at the latest with the last array of it; read again, it is mapped again."""
    if not isinstance(tensor, ir.ExternalTensor):
        return
    try:
        tensor.release()
    except BufferError:  # someone still holds an array of it
        tensor.raw = None
