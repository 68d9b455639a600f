"""Weights and biases of layers that read one tensor, side by side, and the name of the layer that they become."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import array_of, array_shape
from exporters.passes.inserter import Inserter
from exporters.passes.products import made_by

Array = npt.NDArray[np.generic]


def made_for_one(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of `op_type` that makes `value`, for one reader alone."""
    node = made_by(value, op_type)
    return node if value is not None and len(value.uses()) == 1 and not value.is_graph_output() else None


def joined_name(modules: Sequence[str]) -> str:
    """`layers.0.attention.q_proj+k_proj+v_proj` of the three modules; "" where none has a name."""
    if not any(modules):
        return ""
    stem = modules[0].rpartition(".")[0]
    if any(module.rpartition(".")[0] != stem for module in modules):
        return "+".join(filter(None, modules))
    joined = "+".join(module.rpartition(".")[2] for module in modules)
    return f"{stem}.{joined}" if stem else joined


def joined_weight(inserter: Inserter, name: str, weights: Sequence[ir.Value]) -> ir.Value:
    """The constants [K, n] as one [K, Σn], put together when it is read."""
    dtype = weights[0].dtype
    assert dtype is not None
    shape = [array_shape(weights[0])[0], sum(array_shape(weight)[1] for weight in weights)]
    return inserter.lazy_initializer(name, weights, lambda *arrays: np.concatenate(arrays, axis=1), dtype, shape)


def joined_bias(biases: Sequence[ir.Value | None], widths: Sequence[int]) -> Array:
    """The biases [n] or [1] as one [Σn], zeros where there is none; one of them at least is."""
    return joined_parameter([None if bias is None else array_of(bias) for bias in biases], widths)


def joined_parameter(arrays: Sequence[Array | None], widths: Sequence[int]) -> Array:
    """What the channels have, [n], [1] or [], as one [Σn], zeros where there is none; one of them at least is."""
    dtype = next(array.dtype for array in arrays if array is not None)
    parts = [
        np.broadcast_to(np.zeros((), dtype) if array is None else array, (width,))
        for array, width in zip(arrays, widths, strict=True)
    ]
    return np.concatenate(parts)
