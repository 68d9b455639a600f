"""The rules about operators and tensors: what TensorRT's parser reads, and what its compiler has kernels for.

Which operators the parser lacks was asked of TensorRT-RTX 1.7's `OnnxParser.supports_operator`; a test asks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import onnx_ir as ir

from exporters.lint.rule import Rule, Subject
from exporters.qdq_scales import constant_of, dtype_of
from exporters.same_value import same_value

_CONTRIB = "com.microsoft"
# The contrib operators that TensorRT-RTX 1.7 parses all the same.
_PARSED_CONTRIB = frozenset({"Gelu", "MatMulNBits", "MultiHeadAttention"})
QUANTIZED_OPERATORS = frozenset(
    {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
)
# DeformConv is not here: TensorRT has a plugin for it, TensorRT-RTX has none.
UNPARSED_OPERATORS = frozenset(
    {
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "CumProd",
        "DFT",
        "Det",
        "ImageDecoder",
        "MaxRoiPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Multinomial",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    }
)
_NO_TENSORS = frozenset(
    {
        ir.DataType.INT16,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.STRING,
        ir.DataType.COMPLEX64,
        ir.DataType.COMPLEX128,
    }
)
_LARGEST_HALF = float(np.finfo(np.float16).max)
_NO_WEIGHT = 1 << 16  # elements; what is larger is a weight or a table, and is not read


def _contrib_operator(subject: Subject) -> Iterator[ir.Node]:
    return (node for node in subject.nodes() if node.domain == _CONTRIB and node.op_type not in _PARSED_CONTRIB)


def _unparsed_operator(subject: Subject) -> Iterator[ir.Node]:
    return (node for node in subject.nodes() if not node.domain and node.op_type in UNPARSED_OPERATORS)


def _quantized_operator(subject: Subject) -> Iterator[ir.Node]:
    return (node for node in subject.nodes() if not node.domain and node.op_type in QUANTIZED_OPERATORS)


def _given_by_nothing(subject: Subject) -> Iterator[ir.Node]:
    for node in subject.nodes():
        if any(value is not None and _is_loose(value) for value in node.inputs):
            yield node


def _is_loose(value: ir.Value) -> bool:
    return value.producer() is None and not (value.is_graph_input() or value.is_initializer())


def _no_such_tensor(subject: Subject) -> Iterator[ir.Node | ir.Value]:
    for graph in subject.graphs():
        yield from (v for v in (*graph.inputs, *graph.initializers.values()) if dtype_of(v) in _NO_TENSORS)
    for node in subject.nodes():
        kinds = {_written(node, value) for value in node.outputs}
        if kinds & _NO_TENSORS or (ir.DataType.UINT8 in kinds and node.op_type != "QuantizeLinear"):
            yield node


def _float64(subject: Subject) -> Iterator[ir.Node | ir.Value]:
    yield from (value for value in subject.model.graph.inputs if value.dtype == ir.DataType.DOUBLE)
    for node in subject.nodes():
        if node.op_type != "Constant" and any(_written(node, v) == ir.DataType.DOUBLE for v in node.outputs):
            yield node


def _written(node: ir.Node, value: ir.Value) -> ir.DataType | None:
    if node.op_type == "Cast" and not node.domain:
        return ir.DataType(node.attributes.get_int("to", 0))
    return value.dtype


def _float32_attention(subject: Subject) -> Iterator[ir.Node]:
    if subject.device is not None and subject.device.onnx.attention == "op":
        yield from (node for node in _attentions(subject) if dtype_of(node.inputs[0]) == ir.DataType.FLOAT)


def _unknown_attention(subject: Subject) -> Iterator[ir.Node]:
    if subject.device is not None and subject.device.onnx.attention != "op":
        yield from _attentions(subject)


def _same_query_and_key(subject: Subject) -> Iterator[ir.Node]:
    for node in _attentions(subject):
        if len(node.inputs) > 1 and same_value(node.inputs[0], node.inputs[1]):
            yield node


def _attentions(subject: Subject) -> Iterator[ir.Node]:
    return (node for node in subject.nodes() if node.op_type == "Attention" and not node.domain)


def _becomes_infinite(subject: Subject) -> Iterator[ir.Node]:
    for node in subject.nodes():
        if node.op_type != "Cast" or node.domain or node.attributes.get_int("to", 0) != ir.DataType.FLOAT16:
            continue
        tensor = None if node.inputs[0] is None else ir.convenience.get_const_tensor(node.inputs[0])
        if tensor is None or prod(tensor.shape.numpy()) > _NO_WEIGHT:
            continue
        values = constant_of(node.inputs[0])
        if values is not None and np.any(np.isfinite(values) & (np.abs(values) > _LARGEST_HALF)):
            yield node


OPERATORS = (
    Rule(
        "G001",
        "TensorRT's parser lacks this onnxruntime contrib operator",
        "start from the graph before onnxruntime optimized it",
        _contrib_operator,
    ),
    Rule(
        "G002",
        "TensorRT's parser lacks this operator",
        "export the model without it, or compute it outside the graph",
        _unparsed_operator,
    ),
    Rule(
        "G003",
        "TensorRT's parser takes no operator that computes with quantized integers or quantizes as it runs",
        "write it with QuantizeLinear and DequantizeLinear, as `gpusq convert` does, with constant scales",
        _quantized_operator,
    ),
    Rule(
        "G004",
        "nothing gives a value that this node reads: TensorRT's parser knows no sparse_initializer",
        "store the weight dense; 2:4 sparsity is found in its zeros",
        _given_by_nothing,
    ),
    Rule(
        "G005",
        "TensorRT has no tensors of 16-bit or unsigned integers, text or complex numbers; uint8 is for inputs alone",
        "cast it to int32, int64 or a float where it enters the graph",
        _no_such_tensor,
    ),
    Rule(
        "G006",
        "TensorRT has no float64: it computes, takes and gives float32 in silence",
        "export the model in float32",
        _float64,
        severity="warning",
    ),
    Rule(
        "G007",
        "this constant becomes infinite in float16, whose largest value is 65504",
        "clamp the constant to ±65504, or keep what reads it in float32",
        _becomes_infinite,
        severity="warning",
    ),
    Rule(
        "A001",
        "TensorRT has no float32 kernel for the Attention operator",
        "run `gpusq surgery`: it types the graph float16, or writes the attention with MatMul and Softmax",
        _float32_attention,
    ),
    Rule(
        "A002",
        "the device's parser has no Attention operator",
        "run `gpusq surgery`: it writes the attention with MatMul and Softmax",
        _unknown_attention,
    ),
    Rule(
        "A003",
        "TensorRT-RTX 1.7 crashes while it compiles an Attention operator whose query and key are one value",
        "run `gpusq surgery`: it writes this attention with MatMul and Softmax, which becomes one kernel all the same",
        _same_query_and_key,
    ),
)
