"""Give the inputs of a concatenation one scale, so that it joins integers and what reads it computes with them.

    a ─► Q s₁ ─► DQ ─┐                          a ─► Q s ─► DQ ─┐
                     Concat ─► Conv        →                    Concat ─► Conv,    s = max(s₁, s₂)
    b ─► Q s₂ ─► DQ ─┘                          b ─► Q s ─► DQ ─┘

Equal scales need nothing: TensorRT-RTX 1.7 makes the same kernels, the layer behind in INT8, whether the quantizers
stand ahead of the concatenation or behind it. Behind different ones without a quantizer it computes that layer in Half.

The largest scale holds the values of every input. The others round more coarsely, by s / s₁ at most, also for whoever
else reads them; so this changes trained scales, and is done only where it is asked for. Else the concatenation is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import QDQ, scale_of, trace_back
from exporters.module_names import label_of
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Change, LeftAlone, Outcome

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


@dataclass(frozen=True)
class ShareConcatScales:
    """Share the scales of concatenations ahead of quantized layers.

    Attributes:
        asked: whether they are changed; else they are only told.
    """

    asked: bool = False

    def __call__(self, model: ir.Model) -> Outcome:
        """Share them, again until nothing is left to do: a concatenation may be an input of another one."""
        inserter, changes, left = Inserter(model.graph), list[Change](), list[LeftAlone]()
        while found := [(node, quantizers) for node in model.graph if len(_scales(quantizers := _joined(node))) > 1]:
            if not self.asked:
                left = [LeftAlone(label_of(node), _told(quantizers)) for node, quantizers in found]
                break
            changes += [change for node, quantizers in found for change in _share(node, quantizers, inserter)]
        drop_unused_initializers(model.graph)
        return Outcome("share scales of concatenations", len(changes), tuple(left), tuple(changes))


def _joined(node: ir.Node) -> list[ir.Node]:
    """What quantizes the inputs of a concatenation that quantized layers read as it is; empty where one is not."""
    if node.op_type != "Concat" or node.domain or not any(map(_is_quantized_layer, _users(node))):
        return []
    found = [_quantizers(value) for value in node.inputs]
    return [] if not all(found) else list(dict.fromkeys(q for quantizers in found for q in quantizers))


def _users(node: ir.Node) -> list[ir.Node]:
    return [user for user, _ in node.outputs[0].uses()]


def _is_quantized_layer(node: ir.Node) -> bool:
    """Whether a node multiplies by a weight that is quantized."""
    return node.op_type in _PRODUCTS and any(
        any(passed.op_type == "DequantizeLinear" for passed in trace_back(value)[1]) for value in node.inputs[1:2]
    )


def _quantizers(value: ir.Value | None) -> list[ir.Node]:
    """The quantizer of one scale whose integers `value` holds; of a concatenation, those of its inputs."""
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return []
    if node.op_type == "Concat":
        found = [_quantizers(each) for each in node.inputs]
        return [q for quantizers in found for q in quantizers] if all(found) else []
    q = None if node.op_type != "DequantizeLinear" or node.inputs[0] is None else node.inputs[0].producer()
    scale = None if q is None or q.op_type != "QuantizeLinear" else scale_of(q)
    if q is None or scale is None or scale.ndim or any(user.op_type != "DequantizeLinear" for user in _users(q)):
        return []
    return [q]


def _scales(quantizers: list[ir.Node]) -> set[float]:
    return {float(scale) for q in quantizers if (scale := scale_of(q)) is not None}


def _told(quantizers: list[ir.Node]) -> str:
    return (
        f"its inputs have {len(_scales(quantizers))} scales, so what reads it computes in float: "
        "--share-concat-scales gives them the largest"
    )


def _share(concat: ir.Node, quantizers: list[ir.Node], inserter: Inserter) -> Iterator[Change]:
    largest = max(_scales(quantizers))
    for q in quantizers:
        scale = scale_of(q)
        if scale is None or float(scale) == largest:
            continue
        held = inserter.initializer(f"{label_of(concat)}.shared_scale", np.asarray(largest, scale.dtype))
        for node in (q, *(user for user in _users(q) if user.op_type in QDQ)):
            node.replace_input_with(1, held)
        yield Change(label_of(q), f"scale {float(scale):.6g} raised to {largest:.6g}, that of what it is joined with")
