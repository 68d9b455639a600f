"""What stays float32 in a graph that is typed as float16 or bfloat16, found by structure.

    position_ids (int64) ─► Cast ─► Mul(inv_freq) ─► Cos │ ─► …        computed from integers: float16 holds whole
    └──────────────────── float32 ───────────────────────┘             numbers to 2048 only, bfloat16 to 256

    scores ─► Add(−1e9) ─► Softmax │ ─► …                              a constant beyond float16
    x ─► Clip(−3.4e38, 3.4e38) │ ─► …

    q ─► DQ ─► MatMul(DQ(W), one scale) │ ─► the answer                a float32 that an INT8 GEMM writes by itself

What is computed from integers wider than 8 bits stays float32 through arithmetic and movement, up to a function whose
values are small (Cos, Softmax, a comparison) or to an operator that reads another float, to which it is cast. What is
made with a constant beyond the type's range has to end in such a function.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from exporters.answering_layer import answering_layers, bias_of
from exporters.linears import find_linears

F32 = ir.DataType.FLOAT
KEPT_KEY = "gpusq.float32"
"""Metadata of a node that works in float32 whatever the type of its graph: the reason."""
# Operators that move their first input and compute nothing.
_MOVES = frozenset({"Pad", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Identity"})
_ALSO_MOVES = _MOVES | {"Concat", "Expand", "Gather", "GatherElements", "GatherND", "Split", "Tile", "Trilu", "Where"}
_ARITHMETIC = frozenset({
    "Abs", "Add", "Ceil", "Clip", "CumSum", "Div", "Einsum", "Exp", "Floor", "Gemm", "Log", "MatMul", "Max", "Mean",
    "Min", "Mod", "Mul", "Neg", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
    "Relu", "Round", "Sqrt", "Sub", "Sum",
})  # fmt: skip
_PRODUCTS = frozenset({"Einsum", "Gemm", "MatMul"})
# What they give is small whatever they read.
_BOUNDED = frozenset({
    "Atan", "Cast", "Cos", "Equal", "Erf", "Greater", "GreaterOrEqual", "HardSigmoid", "IsInf", "IsNaN", "Less",
    "LessOrEqual", "LogSoftmax", "Sigmoid", "Sign", "Sin", "Softmax", "Softsign", "Tanh",
})  # fmt: skip
# Where a large constant makes nothing large, by the index of the input that it is.
_LIMITS: Mapping[str, Collection[int]] = {"Clip": (1, 2), "Div": (1,)}
_WIDE_INTEGERS = frozenset({
    ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
})  # fmt: skip


def quantized_inputs(graph: ir.Graph) -> set[ir.Node]:
    """The nodes between inputs of the graph and the quantizers that read them, through data movement alone."""
    return {node for value in graph.inputs if value.dtype == F32 for node in _up_to_quantizers(value)}


def _up_to_quantizers(start: ir.Value) -> set[ir.Node]:
    """What can stay float32 behind a graph input; nothing if anything else than a quantizer reads it in the end."""
    found, waiting = set(), [start]
    while waiting:
        for node, index in waiting.pop().uses():
            moves = node.op_type in _MOVES and not _reads_a_float(node)
            if index != 0 or not (moves or node.op_type == "QuantizeLinear"):
                return set()
            found.add(node)
            waiting += node.outputs if moves else ()
    return found


def _reads_a_float(node: ir.Node) -> bool:
    """Whether a further input is a float, such as the value that Pad fills in: it must have the type of the first."""
    return any(value is not None and value.dtype == F32 for value in node.inputs[1:])


def answering_products(graph: ir.Graph) -> set[ir.Node]:
    """The INT8 products that one kernel computes up to a float32 answer, with what dequantizes their operands."""
    found: set[ir.Node] = set()
    for linear in answering_layers(graph):
        operands = [value for value in linear.node.inputs[:2] if value is not None and len(value.uses()) == 1]
        made_by = [value.producer() for value in operands]
        quantized = [node for node in made_by if node is not None and node.op_type == "DequantizeLinear"]
        scale = linear.weight_scale
        if len(quantized) == 2 and scale is not None and scale.ndim == 0 and bias_of(linear) is None:
            found |= {linear.node, *quantized}
    return found


def from_integers(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """The nodes that compute floats from nothing but integers and constants, each with the node where that begins."""
    layers = {linear.node for linear in find_linears(graph)}
    origins: dict[ir.Value, ir.Node] = {}
    found: dict[ir.Node, ir.Node] = {}
    for node in graph:
        origin = node if _begins(node) else _origin(node, origins)
        if origin is None or node in layers:
            continue
        found[node] = origin
        if node is origin or node.op_type not in _BOUNDED:
            origins |= dict.fromkeys(node.outputs, origin)
    return found


def _begins(node: ir.Node) -> bool:
    """Whether the node makes float32 of integers that a shorter float may not hold."""
    if node.op_type != "Cast" or node.domain or node.outputs[0].dtype != F32:
        return False
    return node.inputs[0] is not None and node.inputs[0].dtype in _WIDE_INTEGERS


def _origin(node: ir.Node, origins: Mapping[ir.Value, ir.Node]) -> ir.Node | None:
    """Where the floats begin that the node reads; None if one of them is computed otherwise, or it is no arithmetic."""
    if node.domain or node.op_type not in _ARITHMETIC | _ALSO_MOVES | _BOUNDED:
        return None
    floats = [value for value in node.inputs if value is not None and value.dtype == F32]
    computed = [value for value in floats if not value.is_initializer()]
    if any(value not in origins for value in computed):
        return None
    return next((origins[value] for value in computed), None)


def behind_constants(graph: ir.Graph, beyond: Collection[ir.Value]) -> dict[ir.Node, ir.Value | None]:
    """The nodes that work with constants `beyond` the range of a type, up to those that make small values of them.

    A node comes with the constant itself where the type's range is exceeded by what no function bounds: it cannot be
    typed, unless its values are measured.
    """
    large = {value: value for value in beyond}
    found: dict[ir.Node, ir.Value | None] = {}
    for node in graph:
        reads = [(index, value) for index, value in enumerate(node.inputs) if value in large]
        if not reads:
            continue
        unbounded = [value for index, value in reads if not _is_bounded(node, index)]
        passes_on = unbounded and not node.domain and node.op_type in (_ARITHMETIC | _ALSO_MOVES) - _PRODUCTS
        if passes_on:
            large |= {output: large[unbounded[0]] for output in node.outputs if output.dtype == F32}
        found[node] = large[unbounded[0]] if unbounded and not passes_on else None
    return found


def _is_bounded(node: ir.Node, index: int) -> bool:
    if node.domain:
        return False
    return node.op_type in _BOUNDED or index in _LIMITS.get(node.op_type, ())


def control_flow(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes with graphs inside: these stay as they are."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return (node for node in graph if any(attribute.type in kinds for attribute in node.attributes.values()))
