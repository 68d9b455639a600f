"""The rules of TensorRT's explicit quantization: what its Q/DQ nodes take, and where the compiler keeps them.

The sources are NvInfer.h on IQuantizeLayer and IDequantizeLayer and ONNX's operators; what TensorRT-RTX 1.7 does with a
graph that breaks a rule is compiled by the tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from exporters.linears import QDQ, array_shape, scale_of, trace_back, trace_weight
from exporters.lint.rule import Rule, Subject
from exporters.passes.lower_nvfp4 import is_dynamic_quantize
from exporters.qdq_scales import constant_of, dtype_of, input_at, is_quantizer

_8_BIT_FLOAT, _4_BIT_FLOAT = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1
_OPSET: dict[ir.DataType | None, int] = {
    ir.DataType.INT4: 21,
    ir.DataType.UINT4: 21,
    _8_BIT_FLOAT: 19,
    _4_BIT_FLOAT: 23,
}
_TAKEN = frozenset({ir.DataType.INT8, ir.DataType.INT4, _8_BIT_FLOAT, _4_BIT_FLOAT})
# The first compute capability that has the type: FP8 since Ada, FP4 since Blackwell.
_SINCE = {_8_BIT_FLOAT: 8.9, _4_BIT_FLOAT: 10.0}
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _qdq(subject: Subject) -> Iterator[ir.Node]:
    return filter(is_quantizer, subject.nodes())


def _quantized_type(node: ir.Node) -> ir.DataType | None:
    """The integer (or small float) type of a Q or DQ node by ONNX's rules; None where nothing tells."""
    zero = dtype_of(input_at(node, 2))
    if zero is not None:
        return zero
    if node.op_type == "QuantizeLinear":
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    source, passed = trace_back(node.inputs[0])
    before = next((each for each in passed if each.op_type == "QuantizeLinear"), None)
    return dtype_of(node.inputs[0]) or (_quantized_type(before) if before is not None else dtype_of(source))


def _block(node: ir.Node) -> int:
    return node.attributes.get_int("block_size", 0)


def _uint8(subject: Subject) -> Iterator[ir.Node]:
    return (node for node in _qdq(subject) if _quantized_type(node) == ir.DataType.UINT8)


def _zero_point_not_zero(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        zero = constant_of(input_at(node, 2))
        if zero is not None and np.any(zero.astype(np.float32)):
            yield node


def _scale_not_positive(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        scale = scale_of(node)
        if scale is not None and not np.all(np.isfinite(scale) & np.greater(scale, 0)):
            yield node


def _scale_not_constant(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        if scale_of(node) is None and node.inputs[1] not in subject.constants and not _is_dynamic(node.inputs[1]):
            yield node


def _is_dynamic(scale: ir.Value | None) -> bool:
    """Whether a scale is one that TensorRT finds itself as it quantizes to FP4."""
    source, _ = trace_back(scale)
    return source is not None and is_dynamic_quantize(source.producer())


def _activation_per_channel(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        scale = scale_of(node)
        if scale is not None and scale.size > 1 and trace_back(node.inputs[0])[0] not in subject.constants:
            yield node


def _weight_axis(subject: Subject) -> Iterator[ir.Node]:
    for linear in subject.linears():
        dq = linear.weight_dq
        if dq is None or _block(dq) or linear.node.op_type == "ConvTranspose":
            continue
        scale = scale_of(dq)
        if scale is None or scale.size == 1 or trace_back(dq.inputs[0])[0] is not linear.weight:
            continue
        if dq.attributes.get_int("axis", 1) % len(linear.shape) == linear.k_axis:
            yield dq


def _constant_not_into_dq(subject: Subject) -> Iterator[ir.Node]:
    for graph in subject.graphs():
        for value in graph.initializers.values():
            if value.dtype == ir.DataType.INT8:
                yield from (user for user, index in value.uses() if not _takes_int8(user, index))


def _takes_int8(node: ir.Node, index: int) -> bool:
    return (node.op_type in QDQ and index == 2) or (node.op_type == "DequantizeLinear" and index == 0)


def _int32(subject: Subject) -> Iterator[ir.Node]:
    return (
        node
        for node in _qdq(subject)
        if node.op_type == "DequantizeLinear" and dtype_of(node.inputs[0]) == ir.DataType.INT32
    )


def _scale_type(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        floating = node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]
        scale, value = dtype_of(input_at(node, 1)), dtype_of(floating)
        if scale in _HALF and value is not None and value != scale:
            yield node


def _older_than_its_attributes(subject: Subject) -> Iterator[ir.Node]:
    opset = subject.model.opset_imports.get("", 0)
    for node in _qdq(subject):
        needed = _OPSET.get(_quantized_type(node), 21 if _block(node) else 13 if "axis" in node.attributes else 10)
        if opset < needed:
            yield node


def _int8_blocks(subject: Subject) -> Iterator[ir.Node]:
    return (node for node in _qdq(subject) if _block(node) and _quantized_type(node) == ir.DataType.INT8)


def _blocks_beside_int8(subject: Subject) -> Iterator[ir.Node]:
    for linear in subject.linears():
        dq = linear.weight_dq
        if dq is None or linear.input_q is None or not _block(dq) or _quantized_type(dq) == ir.DataType.INT8:
            continue
        if _quantized_type(linear.input_q) == ir.DataType.INT8:
            yield dq


def _other_type(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        kind = _quantized_type(node)
        if kind is not None and kind not in _TAKEN | {ir.DataType.UINT8, ir.DataType.INT32}:  # these have their rules
            yield node


def _block_axis(subject: Subject) -> Iterator[ir.Node]:
    for node in _qdq(subject):
        rank = _rank(node.inputs[0])
        if _block(node) and rank is not None and node.attributes.get_int("axis", 1) % rank < rank - 2:
            yield node


def _rank(value: ir.Value | None) -> int | None:
    """The number of axes; None where it is not known."""
    if value is None or (value.shape is None and value.const_value is None):
        return None
    return len(array_shape(value)) if value.shape is None else len(value.shape)


def _half_quantized(subject: Subject) -> Iterator[ir.Node]:
    """Products of a quantized activation and something in float; a quantized weight alone is meant: weight-only."""
    for node in subject.nodes():
        if node.domain or node.op_type not in _PRODUCTS:
            continue
        sources, passed = zip(*(trace_weight(value) for value in node.inputs[:2]), strict=True)
        quantized = [any(each.op_type in QDQ for each in nodes) for nodes in passed]
        computed = [source not in subject.constants for source in sources]
        if not all(quantized) and any(each and both for each, both in zip(quantized, computed, strict=True)):
            yield node


def _type_of_another_device(subject: Subject) -> Iterator[ir.Node]:
    if subject.device is None or subject.device.compute_capability is None:
        return
    capability = float(subject.device.compute_capability)
    for node in subject.nodes():
        kind = _4_BIT_FLOAT if is_dynamic_quantize(node) else _quantized_type(node) if is_quantizer(node) else None
        if kind is not None and capability < _SINCE.get(kind, 0):
            yield node


QUANTIZATION = (
    Rule(
        "Q001",
        "quantize to int8: ONNX computes uint8, also where a quantizer has no zero-point; TensorRT computes int8 "
        "instead, or refuses it",
        "give the quantizer an explicit int8 zero-point of 0",
        _uint8,
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
        onnx=True,
    ),
    Rule(
        "Q004",
        "activations are quantized per tensor, never per channel: TensorRT would fall back to float",
        "use one scale for the activation",
        _activation_per_channel,
    ),
    Rule(
        "Q005",
        "weight scales belong to the output channels: along K the GEMM or convolution would run dequantized",
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
        _int32,
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
        "Q010",
        "scales along an axis came with opset 13, FP8 with 19, blocks and 4-bit integers with 21, FP4 with 23: "
        "TensorRT takes them from an older model, ONNX and onnxruntime do not",
        "export or convert the model with that opset or a newer one",
        _older_than_its_attributes,
        onnx=True,
    ),
    Rule(
        "Q011",
        "TensorRT has no blocks of INT8: one INT8 GEMM is made of them, to whose sum their scales cannot be applied",
        "use one scale for each output channel",
        _int8_blocks,
    ),
    Rule(
        "Q012",
        "blocks of weights go with float activations: beside INT8 ones TensorRT makes one INT8 GEMM, to whose sum the "
        "scales of blocks cannot be applied",
        "leave the activation in float (weight-only), or use one scale for each output channel",
        _blocks_beside_int8,
    ),
    Rule(
        "Q013",
        "TensorRT quantizes to INT8, INT4, FP8 (E4M3) and FP4 (E2M1), to nothing else",
        "quantize to one of these types",
        _other_type,
    ),
    Rule(
        "Q014",
        "blocks lie along the last axis of a tensor or the one before it",
        "move the axis of the blocks to the end of the stored weight",
        _block_axis,
    ),
    Rule(
        "Q015",
        "the other operand is not quantized: the product runs in float, its Q/DQ cost time and accuracy for nothing",
        "quantize both operands, or take the quantizers away",
        _half_quantized,
        severity="warning",
    ),
    Rule(
        "Q016",
        "the device has no such type: FP8 needs compute capability 8.9, FP4 10.0",
        "quantize to INT8, or choose a profile that has the type",
        _type_of_another_device,
    ),
)
