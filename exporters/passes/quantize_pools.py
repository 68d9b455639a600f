"""Let a chain of max poolings work on the integers that are made of its results in the end.

    x ─► Pool ─► Pool ─► Concat ─► Q, s     →     x ─► QDQ, s ─► Pool ─► QDQ, s ─► Pool ─► QDQ, s ─► Concat ─► Q, s

The largest of rounded values is the largest one rounded, and Q(DQ(q)) = q, so not a single integer changes. Without
the quantizers in between, TensorRT-RTX moves the last one ahead of each pooling for each of its readers, and computes
a chain once for each: six poolings for the three of YOLO's pyramid. One pooling alone gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import scale_of
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, Outcome
from exporters.qdq_scales import constant_of, input_at

_KEEPS_ORDER = frozenset({"MaxPool", "Concat"})


@dataclass(frozen=True)
class QuantizePools:
    """Quantize between the poolings of each chain."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Quantize what they read and give, for the readers that end in quantizers of one scale."""
        graph, changes = model.graph, []
        chained = [node for node in graph if _is_pool(node) and any(_is_pool(user) for user, _ in _uses(node))]
        pools = [node for node in graph if _is_pool(node) and (node in chained or _reads_any_of(node, chained))]
        for value in dict.fromkeys(value for pool in pools for value in (pool.inputs[0], pool.outputs[0])):
            assert value is not None
            if (end := _one_end(pools, value)) is not None:
                _quantize(value, end, graph)
                changes.append(
                    Change(str(value.name), f"quantized between poolings, with the scale of {label_of(end)}")
                )
        return Outcome("quantize pools", len(changes), (), tuple(changes))


def _is_pool(node: ir.Node) -> bool:
    return node.op_type == "MaxPool" and not node.domain and len(node.outputs) == 1


def _uses(node: ir.Node) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in node.outputs[0].uses()]


def _reads_any_of(pool: ir.Node, others: list[ir.Node]) -> bool:
    return any(pool.inputs[0] is other.outputs[0] for other in others)


def _one_end(pools: list[ir.Node], value: ir.Value) -> ir.Node | None:
    """A quantizer with the one scale in which all that is made of `value` ends; None where it is no such value."""
    producer = value.producer()
    if value.is_graph_output() or (producer is not None and producer.op_type == "DequantizeLinear"):
        return None
    pooled = producer in pools
    readers = [user for user, _ in value.uses() if pooled or user in pools]
    ends = [end for user in readers for end in _ends(user)]
    return (
        ends[0]
        if ends and all(_ends_in(end, scale_of(ends[0]) if _is_int8(ends[0]) else None) for end in ends)
        else None
    )


def _ends(node: ir.Node) -> list[ir.Node]:
    """Where what `node` gives ends, behind poolings and concatenations; `node` itself if it is neither."""
    if node.op_type not in _KEEPS_ORDER or node.domain or node.outputs[0].is_graph_output():
        return [node]
    return [end for user, _ in _uses(node) for end in _ends(user)]


def _is_int8(q: ir.Node) -> bool:
    """Whether it is a quantizer with one scale, and an int8 zero-point of 0."""
    zero, scale = constant_of(input_at(q, 2)), scale_of(q) if q.op_type == "QuantizeLinear" else None
    return scale is not None and scale.ndim == 0 and zero is not None and zero.dtype == np.int8 and not np.any(zero)


def _quantize(value: ir.Value, like: ir.Node, graph: ir.Graph) -> None:
    """Let the readers of `value` that end in `like`'s scale read it quantized."""
    scale = scale_of(like)
    readers = [use for use in value.uses() if all(_ends_in(end, scale) for end in _ends(use.node))]
    order = {node: index for index, node in enumerate(graph)}
    first = min((use.node for use in readers), key=order.__getitem__)
    module, parameters = first.metadata_props.get(MODULE_KEY, ""), [one for one in like.inputs[1:] if one is not None]
    inserter = Inserter(graph)
    assert value.dtype is not None
    made = value
    for op_type, dtype in (("QuantizeLinear", ir.DataType.INT8), ("DequantizeLinear", value.dtype)):
        made = inserter.node(op_type, [made, *parameters], dtype=dtype, module=module, before=first, shape=value.shape)
    for user, index in readers:
        user.replace_input_with(index, made)


def _ends_in(end: ir.Node, scale: object) -> bool:
    return _is_int8(end) and scale_of(end) == scale
