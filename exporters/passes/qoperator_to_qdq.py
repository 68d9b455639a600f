"""Rewrite integer operators (onnxruntime's QOperator format) as a float operator between DQ and Q.

    x, w int8 ─► QLinearConv ─► y int8     x ─► DQ ─► Conv ─► Q ─► y
                                      →    w ─► DQ ──►▲  ▲── bias float

    y = saturate(round(conv(x, w) · x_scale · w_scale / y_scale) + y_zero_point),  bias = bias_int32 · x_scale · w_scale

Scales and zero-points are the very same tensors, so no bit of them changes. Data movement on integers, Q ─► Reshape ─►
DQ, gets a pair of its own, Q ─► DQ ─► Reshape ─► Q ─► DQ, which is exact since Q(DQ(q)) = q; so every integer tensor
lies between a Q and a DQ in the end.

Dynamic quantization has no such form: its scales exist only at run time, and TensorRT has no dynamic INT8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.qdq_scales import constant_of, dtype_of, input_at
from profiles.errors import GpusqError

_CONTRIB = "com.microsoft"
_8_BIT = (ir.DataType.INT8, ir.DataType.UINT8)
_16_BIT = (ir.DataType.INT16, ir.DataType.UINT16)
_QDQ_16_BIT_OPSET = 21
_QUANTIZE_STATICALLY = (
    "quantize the float model statically, with Q/DQ nodes: onnxruntime.quantization.quantize_static with "
    "quant_format=QuantFormat.QDQ and extra_options ActivationSymmetric and WeightSymmetric"
)
_DYNAMIC = frozenset(
    {
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeLSTM",
    }
)
# What moves integers and computes nothing; MaxPool picks one of them.
_MOVES = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity", "Split", "Gather", "Expand"}
    | {"DepthToSpace", "SpaceToDepth", "MaxPool", "Concat"}
)
Quantized = tuple[int, int, int]


@dataclass(frozen=True)
class _Form:
    """How an integer operator lays out its inputs.

    Attributes:
        op_type: the float operator that it stands for.
        inputs: for each input of that operator, where it is: (tensor, scale, zero-point), or one that is not quantized.
        output: where the output's (scale, zero-point) are.
        bias: where the int32 bias is.
        dropped: attributes that the float operator does not have; one that is not 0 is refused.
    """

    op_type: str
    inputs: tuple[Quantized | int, ...]
    output: tuple[int, int]
    bias: int | None = None
    dropped: tuple[str, ...] = ()


_TWO: tuple[Quantized, ...] = ((0, 1, 2), (3, 4, 5))
_ONE: tuple[Quantized, ...] = ((0, 1, 2),)
_FORMS = {
    ("", "QLinearConv"): _Form("Conv", _TWO, (6, 7), bias=8),
    ("", "QLinearMatMul"): _Form("MatMul", _TWO, (6, 7)),
    (_CONTRIB, "QGemm"): _Form("Gemm", _TWO, (7, 8), bias=6),
    (_CONTRIB, "QLinearConv"): _Form("Conv", _TWO, (6, 7), bias=8, dropped=("channels_last",)),
    (_CONTRIB, "QLinearAdd"): _Form("Add", _TWO, (6, 7)),
    (_CONTRIB, "QLinearMul"): _Form("Mul", _TWO, (6, 7)),
    (_CONTRIB, "QLinearWhere"): _Form("Where", (0, (1, 2, 3), (4, 5, 6)), (7, 8)),
    (_CONTRIB, "QLinearSigmoid"): _Form("Sigmoid", _ONE, (3, 4)),
    (_CONTRIB, "QLinearLeakyRelu"): _Form("LeakyRelu", _ONE, (3, 4)),
    (_CONTRIB, "QLinearSoftmax"): _Form("Softmax", _ONE, (3, 4)),
    (_CONTRIB, "QLinearAveragePool"): _Form("AveragePool", _ONE, (3, 4), dropped=("channels_last",)),
    (_CONTRIB, "QLinearGlobalAveragePool"): _Form("GlobalAveragePool", _ONE, (3, 4), dropped=("channels_last",)),
}


@dataclass(frozen=True)
class QOperatorToQdq:
    """Rewrite every integer operator of the graph."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Rewrite them.

        Raises:
            GpusqError: the model is quantized dynamically, or has an integer operator without a Q/DQ form; nothing is
                edited then.
        """
        nodes = list(model.graph)
        forms = {node: form for node in nodes if (form := _form_of(node)) is not None}
        _check(model.graph, forms)
        inserter = Inserter(model.graph)
        changed, left = 0, []
        for node, following in zip(nodes, [*nodes[1:], None], strict=True):
            if node in forms:
                _rewrite(node, forms[node], inserter)
                changed += 1
            elif node.domain == _CONTRIB and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                if why := _standardize(node, model.opset_imports.get("", 0)):
                    left.append(LeftAlone(node.name or "", why))
                else:
                    changed += 1
            elif node.op_type in _MOVES and not node.domain and _moves_integers(node):
                _wrap(node, inserter, following)
                changed += 1
        drop_unused_initializers(model.graph)
        return Outcome("Q operators to Q/DQ", changed, tuple(left))


def _form_of(node: ir.Node) -> _Form | None:
    if (node.domain, node.op_type) == (_CONTRIB, "QLinearConcat"):
        triples = tuple((index, index + 1, index + 2) for index in range(2, len(node.inputs), 3))
        return _Form("Concat", triples, (0, 1))
    return _FORMS.get((node.domain, node.op_type))


def _check(graph: ir.Graph, forms: Mapping[ir.Node, _Form]) -> None:
    """Refuse, before anything is edited, what cannot be rewritten."""
    nodes = list(graph.all_nodes())
    _refuse(
        [node for node in nodes if node.op_type in _DYNAMIC],
        "dynamic quantization computes its scales at run time, and TensorRT has no dynamic INT8",
        _QUANTIZE_STATICALLY,
    )
    _refuse(
        [node for node in nodes if _is_unknown(node) and node not in forms],
        "this integer operator has no Q/DQ form, or lies inside control flow",
        _QUANTIZE_STATICALLY,
    )
    for node, form in forms.items():
        if why := _unreadable(node, form):
            _refuse([node], why, _QUANTIZE_STATICALLY)


def _refuse(nodes: Sequence[ir.Node], what: str, hint: str) -> None:
    if nodes:
        first = nodes[0]
        more = f" and {len(nodes) - 1} more" if nodes[1:] else ""
        raise GpusqError(f"{_where(first)} ({first.op_type}){more}: {what}", hint=hint)


def _where(node: ir.Node) -> str:
    module = node.metadata_props.get(MODULE_KEY)
    return f"{module}, node {node.name!r}" if module else f"node {node.name!r}"


def _is_unknown(node: ir.Node) -> bool:
    return node.op_type.startswith(("QLinear", "QOrdered")) or (
        node.domain == _CONTRIB and node.op_type in ("QGemm", "QAttention", "QEmbedLayerNormalization")
    )


def _unreadable(node: ir.Node, form: _Form) -> str:
    """Why a node does not have the form that it should; "" if it has."""
    if any(node.attributes.get_int(name, 0) != 0 for name in form.dropped):
        return f"{form.dropped[0]} has no counterpart in ONNX"
    for place in form.inputs:
        if isinstance(place, tuple):
            scale, tensor = constant_of(input_at(node, place[1])), input_at(node, place[0])
            if scale is not None and scale.size > 1 and (scale.ndim != 1 or tensor is None or tensor.shape is None):
                return "its scale is neither one number nor one per channel of a tensor whose rank is known"
    if form.bias is not None and input_at(node, form.bias) is not None:
        parts = [constant_of(input_at(node, index)) for index in (form.bias, 1, 4)]
        if any(part is None for part in parts):
            return "its int32 bias or the scales of it are computed in the graph"
    return ""


def _rewrite(node: ir.Node, form: _Form, inserter: Inserter) -> None:
    module = node.metadata_props.get(MODULE_KEY, "")
    inputs = [
        _dequantized(node, place, inserter) if isinstance(place, tuple) else node.inputs[place] for place in form.inputs
    ]
    if form.bias is not None and input_at(node, form.bias) is not None:
        inputs.append(_float_bias(node, form.bias, inserter))
    scale, zero = (input_at(node, index) for index in form.output)
    output = node.outputs[0]
    float_type = ir.DataType.FLOAT
    y = inserter.node(
        form.op_type,
        [x for x in inputs if x is not None],
        dtype=float_type,
        module=module,
        before=node,
        shape=output.shape,
    )
    new = y.producer()
    assert new is not None
    for name, attribute in node.attributes.items():
        if name not in form.dropped and name != "opset":  # QLinearSoftmax tells which opset's Softmax it is
            new.attributes[name] = attribute
    if scale is not None:
        operands = [y, scale] if zero is None else [y, scale, zero]
        dtype = dtype_of(zero) or ir.DataType.UINT8
        y = inserter.node("QuantizeLinear", operands, dtype=dtype, module=module, before=node, shape=output.shape)
    inserter.replace(node, y)
    new.name = node.name


def _dequantized(node: ir.Node, place: Quantized, inserter: Inserter) -> ir.Value | None:
    tensor, scale, zero = (input_at(node, index) for index in place)
    assert tensor is not None
    assert scale is not None
    values = constant_of(scale)
    axis = None if values is None or values.size == 1 else _axis(node, len(tensor.shape or ()))
    return inserter.node(
        "DequantizeLinear",
        [tensor, scale] if zero is None else [tensor, scale, zero],
        dtype=ir.DataType.FLOAT,
        module=node.metadata_props.get(MODULE_KEY, ""),
        attributes={} if axis is None else {"axis": axis},
        before=node,
        shape=tensor.shape,
    )


def _axis(node: ir.Node, rank: int) -> int:
    """The axis of the output channels in the weight."""
    if node.op_type == "QLinearConv" or node.attributes.get_int("transB", 0) == 1:
        return 0
    return rank - 1


def _float_bias(node: ir.Node, place: int, inserter: Inserter) -> ir.Value:
    bias, scale, weight_scale = (constant_of(input_at(node, index)) for index in (place, 1, 4))
    assert bias is not None
    assert scale is not None
    assert weight_scale is not None
    factor = np.float32(node.attributes.get_float("alpha", 1.0)) * (scale.reshape(()) * weight_scale)
    array = (bias.astype(np.float32) * factor.reshape(-1 if factor.size > 1 else ())).astype(np.float32)
    value = node.inputs[place]
    assert value is not None
    return inserter.initializer(f"{(value.name or '').removesuffix('_quantized')}", array)


def _standardize(node: ir.Node, opset: int) -> str:
    """Move a Q/DQ node of onnxruntime to the standard domain; return why not where that is not possible."""
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    zero = input_at(node, 2)
    dtype = dtype_of(zero) or dtype_of(integers)
    if dtype in _16_BIT and opset < _QDQ_16_BIT_OPSET:
        return f"the standard operator has no {dtype.name.lower()} before opset {_QDQ_16_BIT_OPSET}"
    node.domain = ""
    return ""


def _quantizer_of(value: ir.Value | None) -> ir.Node | None:
    """The Q node that computes `value`, if it computes 8-bit integers per tensor."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "QuantizeLinear" or producer.domain:
        return None
    zero = input_at(producer, 2)
    if zero is not None and dtype_of(zero) not in _8_BIT:
        return None
    scale = constant_of(producer.inputs[1])
    return producer if scale is not None and scale.size == 1 else None


def _moves_integers(node: ir.Node) -> bool:
    """Whether all that the node moves are 8-bit integers of one scale and zero-point."""
    sources = [_quantizer_of(value) for value in _moved(node)]
    if None in sources:
        return False
    first = sources[0]
    return first is not None and all(source is not None and _same(source, first) for source in sources)


def _moved(node: ir.Node) -> Sequence[ir.Value | None]:
    return node.inputs if node.op_type == "Concat" else node.inputs[:1]


def _same(left: ir.Node, right: ir.Node) -> bool:
    for index in (1, 2):
        ours, theirs = input_at(left, index), input_at(right, index)
        if ours is not theirs:
            a, b = constant_of(ours), constant_of(theirs)
            if a is None or b is None or a.dtype != b.dtype or a.tobytes() != b.tobytes():
                return False
    return True


def _wrap(node: ir.Node, inserter: Inserter, following: ir.Node | None) -> None:
    """Let a data movement work on floats, between a DQ and a Q of the scale that its integers have."""
    module = node.metadata_props.get(MODULE_KEY, "")
    for index, value in enumerate(_moved(node)):
        quantizer = _quantizer_of(value)
        assert quantizer is not None
        assert value is not None
        operands = [value, *(x for x in quantizer.inputs[1:] if x is not None)]
        x = inserter.node(
            "DequantizeLinear", operands, dtype=ir.DataType.FLOAT, module=module, before=node, shape=value.shape
        )
        node.replace_input_with(index, x)
    for output in node.outputs[:1] if node.op_type == "MaxPool" else node.outputs:
        _requantize(output, operands, module, inserter, following)


def _requantize(
    output: ir.Value, operands: Sequence[ir.Value], module: str, inserter: Inserter, following: ir.Node | None
) -> None:
    integers, uses = operands[0].dtype or ir.DataType.UINT8, list(output.uses())
    output.type = ir.TensorType(ir.DataType.FLOAT)
    q = inserter.node(
        "QuantizeLinear", [output, *operands[1:]], dtype=integers, module=module, before=following, shape=output.shape
    )
    for user, index in uses:
        user.replace_input_with(index, q)
    if output.is_graph_output():
        name, output.name = output.name, f"{output.name}_float"
        q.name = name
        graph = inserter.graph
        for index, value in enumerate(list(graph.outputs)):
            if value is output:
                graph.outputs[index] = q
