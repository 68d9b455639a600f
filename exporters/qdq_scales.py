"""The scales of QuantizeLinear and DequantizeLinear: finite and positive, but for channels of nothing but zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters import quantizer
from exporters.linears import QDQ

Array = npt.NDArray[Any]
POSITIVE = "a scale must be finite and positive; a scale of 0 is mended only for a channel that holds nothing but zeros"


def constant_of(value: ir.Value | None) -> Array | None:
    """The values of a constant, whether initializer or Constant node; None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The type of a value, declared or of its constant; None where neither tells."""
    if value is None or value.dtype is not None:
        return None if value is None else value.dtype
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.dtype


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """The node's input, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def spread(parameter: Array, node: ir.Node, shape: tuple[int, ...]) -> Array:
    """A scale or zero-point so that it broadcasts with the tensor: per tensor, per channel of `axis`, or per block.

    Raises:
        ValueError: it does not fit `shape`.
    """
    if parameter.size == 1:
        return parameter.reshape(())
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} of a tensor with {len(shape)} axes")
    spreaded = quantizer.spread(parameter, shape, axis, block or None)
    if np.broadcast_shapes(spreaded.shape, shape) != shape:
        raise ValueError(f"shape {spreaded.shape} for a tensor of shape {shape}")
    return spreaded


def bad_scale(node: ir.Node) -> str:
    """What is wrong with the scale of a Q/DQ node; "" if nothing, if it is computed, or 0 for dead channels only."""
    scale = constant_of(input_at(node, 1))
    if scale is None:
        return ""
    if scale.dtype.kind in "iub":
        return f"is {scale.dtype.name}, no float"
    if not np.isfinite(scale).all():
        return "is not finite"
    if np.any(scale < 0):
        return f"is negative ({float(scale.min()):g})"
    if not _fits(node, scale):
        return f"or its zero-point does not fit what it scales (shape {list(scale.shape)})"
    return "is 0" if np.any(scale == 0) and np.any((scale == 0) & ~dead_channels(node)) else ""


def _fits(node: ir.Node, scale: Array) -> bool:
    x = input_at(node, 0)
    values, zero = None if x is None else ir.convenience.get_const_tensor(x), constant_of(input_at(node, 2))
    if values is None:
        return True
    shape = tuple(values.shape.numpy())
    try:
        spread(scale, node, shape)
        return zero is None or spread(zero, node, shape) is not None
    except ValueError:
        return False


def dead_channels(node: ir.Node) -> npt.NDArray[np.bool_]:
    """For each scale of a Q/DQ node, whether all that it scales are constant zeros; of the scale's shape."""
    scale = constant_of(input_at(node, 1))
    assert scale is not None
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    if node.op_type == "DequantizeLinear" and producer is not None and producer.op_type == "QuantizeLinear":
        behind = constant_of(input_at(producer, 1))
        if behind is not None and np.array_equal(behind, scale):
            return dead_channels(producer)
    values = constant_of(input_at(node, 0))
    if values is None:
        return np.zeros(scale.shape, np.bool_)
    zero = constant_of(input_at(node, 2)) if node.op_type == "DequantizeLinear" else None
    alive = values != (0 if zero is None else spread(zero, node, values.shape))
    if scale.size == 1:
        return np.full(scale.shape, not alive.any())
    axis = node.attributes.get_int("axis", 1) % values.ndim
    channels = ~alive.any(axis=tuple(index for index in range(values.ndim) if index != axis))
    return channels if channels.shape == scale.shape else np.zeros(scale.shape, np.bool_)


def is_quantizer(node: ir.Node) -> bool:
    """Whether the node is a Q or DQ of the standard domain."""
    return node.op_type in QDQ and not node.domain
