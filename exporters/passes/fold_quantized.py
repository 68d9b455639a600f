"""Fold what is constant around quantizers, so that each quantized constant is one tensor right before its DQ.

    W float ─► Q ─► DQ                    Wq int8 ─► DQ             q = saturate(round(W / scale) + zero_point)
    Wq int8 ─► Transpose ─► DQ     →      Wqᵀ int8 ─► DQ            TensorRT refuses anything between the two
    b int32 ─► DQ                         b float                   b · scale; TensorRT dequantizes no int32

Scales are not touched. A constant that something else reads as well is folded once more, beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Outcome
from exporters.qdq_scales import POSITIVE, Array, bad_scale, constant_of, dtype_of, input_at, is_quantizer, spread
from profiles.errors import GpusqError

_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity"})
_INTEGERS = {
    dtype: dtype.numpy()
    for dtype in (
        *(ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8),
        *(ir.DataType.INT16, ir.DataType.UINT16),
    )
}


@dataclass(frozen=True)
class FoldQuantized:
    """Fold them."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Fold them.

        Raises:
            GpusqError: a scale is not finite and positive.
        """
        graph = model.graph
        check_scales(graph)
        inserter, changed = Inserter(graph), 0
        for node in list(graph):
            folded = _folded(node)
            if folded is None:
                continue
            name, array = folded
            inserter.replace(node, inserter.initializer(name, array))
            changed += 1
        if changed:
            check_scales(graph)  # those of constants that were not known as such before
        drop_unused_initializers(graph)
        return Outcome("fold quantized constants", changed)


def check_scales(graph: ir.Graph) -> None:
    """Raise GpusqError for the first scale that is not finite and positive, and the number of the others."""
    bad = [(node.name, trouble) for node in graph.all_nodes() if is_quantizer(node) and (trouble := bad_scale(node))]
    if bad:
        (name, trouble), more = bad[0], f" ({len(bad) - 1} more like it)" if bad[1:] else ""
        raise GpusqError(f"the scale of {name!r} {trouble}{more}", hint=POSITIVE)


def integer_range(dtype: ir.DataType) -> tuple[int, int]:
    """The smallest and the largest integer of a type of at most 16 bits."""
    info = ml_dtypes.iinfo(_INTEGERS[dtype])  # type: ignore[no-untyped-call]
    return int(info.min), int(info.max)


def _folded(node: ir.Node) -> tuple[str, Array] | None:
    """The name and the values of what a node computes; None where it is not constant or not ours."""
    if node.domain or any(value is not None and constant_of(value) is None for value in node.inputs):
        return None
    if node.outputs[0].is_graph_output() or not node.inputs:
        return None
    values = constant_of(node.inputs[0])
    if values is None:
        return None
    name = (node.inputs[0].name if node.inputs[0] else None) or node.outputs[0].name or ""
    if node.op_type in _MOVES and _reaches_quantizer(node.outputs[0]):
        moved: Any = ReferenceEvaluator(ir.to_proto(node)).run(None, _feeds(node))
        return name, np.asarray(moved[0])
    if node.op_type == "QuantizeLinear" and (dtype := quantized_type(node)) in _INTEGERS:
        return f"{name}_quantized", _quantized(node, values, dtype)
    if node.op_type == "DequantizeLinear" and values.dtype == np.int32:
        return name.removesuffix("_quantized"), _dequantized(node, values)
    return None


def quantized_type(node: ir.Node) -> ir.DataType:
    """The type that a QuantizeLinear node writes: of its zero-point, else as it says, else uint8."""
    zero = input_at(node, 2)
    if (dtype := dtype_of(zero)) is not None:
        return dtype
    declared = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(declared) if declared else ir.DataType.UINT8


def _reaches_quantizer(value: ir.Value) -> bool:
    for node, index in value.uses():
        if index == 0 and is_quantizer(node):
            return True
        if index == 0 and node.op_type in _MOVES and _reaches_quantizer(node.outputs[0]):
            return True
    return False


def _feeds(node: ir.Node) -> dict[str, Array]:
    found = {value.name or "": constant_of(value) for value in node.inputs if value is not None}
    return {name: array for name, array in found.items() if array is not None}


def _parameters(node: ir.Node, shape: tuple[int, ...]) -> tuple[Array, Array]:
    scale, zero = constant_of(node.inputs[1]), constant_of(input_at(node, 2))
    assert scale is not None
    spread_zero = np.zeros((), np.int32) if zero is None else spread(zero, node, shape).astype(np.int32)
    return spread(scale, node, shape).astype(np.float32), spread_zero


def _quantized(node: ir.Node, values: Array, dtype: ir.DataType) -> Array:
    scale, zero = _parameters(node, values.shape)
    low, high = integer_range(dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scale == 0, 0, np.rint(values.astype(np.float32) / scale))  # a dead channel holds zeros
    return np.asarray(np.clip(steps + zero, low, high).astype(np.int32).astype(_INTEGERS[dtype]))


def _dequantized(node: ir.Node, values: Array) -> Array:
    scale, zero = _parameters(node, values.shape)
    kept = constant_of(node.inputs[1])
    assert kept is not None
    return np.asarray(((values - zero).astype(np.float32) * scale).astype(kept.dtype))
