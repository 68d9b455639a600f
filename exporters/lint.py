"""The hard rules of TensorRT's explicit quantization, checked on the graph before a compiler sees it.

Each rule has an identifier, a sentence and a cure. Some broken rules make the parser fail; the worse ones compile and
compute something else, such as a quantizer without a zero-point: uint8 by ONNX, signed by TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import QDQ, array_of, array_shape, find_linears, scale_of, trace_back

_CONTRIB = "com.microsoft"
_SIGNED = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
# The contrib operators that TensorRT-RTX 1.7 parses all the same.
_PARSED_CONTRIB = frozenset({"Gelu", "MatMulNBits", "MultiHeadAttention"})


@dataclass(frozen=True)
class Rule:
    """One hard rule; `broken_by` yields the name of each node that breaks it."""

    id: str
    sentence: str
    cure: str
    broken_by: Callable[[ir.Graph], Iterator[str]]


@dataclass(frozen=True)
class Finding:
    """A node that breaks a rule."""

    rule: Rule
    where: str

    def __str__(self) -> str:
        return f"{self.rule.id} {self.where}: {self.rule.sentence}"


def lint(model: ir.Model) -> list[Finding]:
    """Return every breach of the hard rules in `model`."""
    return [Finding(rule, where) for rule in RULES for where in rule.broken_by(model.graph)]


def _qdq(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type in QDQ and not node.domain)


def _no_int8_zero_point(graph: ir.Graph) -> Iterator[str]:
    for node in _qdq(graph):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None or zero.dtype not in _SIGNED:
            yield node.name or ""


def _zero_point_not_zero(graph: ir.Graph) -> Iterator[str]:
    for node in _qdq(graph):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not None and zero.const_value is not None and np.any(array_of(zero)):
            yield node.name or ""


def _scale_not_positive(graph: ir.Graph) -> Iterator[str]:
    for node in _qdq(graph):
        scale = scale_of(node)
        if scale is not None and not np.all(np.isfinite(scale) & np.greater(scale, 0)):
            yield node.name or ""


def _scale_not_constant(graph: ir.Graph) -> Iterator[str]:
    return (node.name or "" for node in _qdq(graph) if scale_of(node) is None)


def _activation_per_channel(graph: ir.Graph) -> Iterator[str]:
    for node in _qdq(graph):
        source, _ = trace_back(node.inputs[0])
        scale = scale_of(node)
        if source is not None and not source.is_initializer() and scale is not None and scale.size > 1:
            yield node.name or ""


def _weight_axis(graph: ir.Graph) -> Iterator[str]:
    for linear in find_linears(graph):
        dq = linear.weight_dq
        scale = None if dq is None else scale_of(dq)
        if linear.kind != "gemm" or dq is None or scale is None or scale.ndim == 0:
            continue
        rank = len(array_shape(linear.weight))
        along = dq.attributes.get_int("axis", 1) % rank == linear.k_axis
        if along and not dq.attributes.get_int("block_size", 0):
            yield dq.name or ""


def _constant_not_into_dq(graph: ir.Graph) -> Iterator[str]:
    for value in graph.initializers.values():
        if value.dtype != ir.DataType.INT8:
            continue
        for node, index in value.uses():
            if not (node.op_type in QDQ and index == 2) and not (node.op_type == "DequantizeLinear" and index == 0):
                yield node.name or ""


def _int32_bias(graph: ir.Graph) -> Iterator[str]:
    for node in _qdq(graph):
        x = node.inputs[0]
        if node.op_type == "DequantizeLinear" and x is not None and x.dtype == ir.DataType.INT32:
            yield node.name or ""


def _scale_type(graph: ir.Graph) -> Iterator[str]:
    for node in _qdq(graph):
        floating = node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]
        scale = node.inputs[1]
        if scale is None or floating is None or None in (scale.dtype, floating.dtype):
            continue
        if scale.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and floating.dtype != scale.dtype:
            yield node.name or ""


def _contrib_operator(graph: ir.Graph) -> Iterator[str]:
    for node in graph:
        if node.domain == _CONTRIB and node.op_type not in _PARSED_CONTRIB:
            yield node.name or node.op_type


RULES = (
    Rule(
        "Q001",
        "a quantizer needs an explicit int8 zero-point: without one ONNX computes uint8 and TensorRT int8",
        "give it an int8 zero-point of 0",
        _no_int8_zero_point,
    ),
    Rule(
        "Q002",
        "TensorRT quantizes symmetrically: the zero-point must be 0",
        "train or calibrate with symmetric quantization",
        _zero_point_not_zero,
    ),
    Rule(
        "Q003",
        "every scale must be finite and positive",
        "give a dead channel any positive scale, such as 1/127",
        _scale_not_positive,
    ),
    Rule(
        "Q004",
        "activations are quantized per tensor, never per channel: TensorRT would fall back to float",
        "use one scale for the activation",
        _activation_per_channel,
    ),
    Rule(
        "Q005",
        "weight scales belong to the output channels: along K the GEMM would run dequantized",
        "set the DequantizeLinear's axis to the output channels",
        _weight_axis,
    ),
    Rule(
        "Q006",
        "an INT8 constant may feed only a DequantizeLinear: a Transpose between the two is refused",
        "store the constant as the GEMM reads it, or move the Transpose behind the DequantizeLinear",
        _constant_not_into_dq,
    ),
    Rule(
        "Q007",
        "TensorRT dequantizes no INT32: a quantized bias is refused",
        "keep the bias in float (onnxruntime: QuantizeBias=False)",
        _int32_bias,
    ),
    Rule(
        "Q008",
        "a float16 scale must go with a float16 tensor",
        "type both alike, or keep the scale in float32",
        _scale_type,
    ),
    Rule(
        "Q009",
        "a scale must be a constant: TensorRT leaves a layer with a computed one in float",
        "fold the computation of the scale, or quantize with trained or calibrated scales",
        _scale_not_constant,
    ),
    Rule(
        "G001",
        "TensorRT's parser lacks this onnxruntime contrib operator",
        "start from the graph before onnxruntime optimized it",
        _contrib_operator,
    ),
)
