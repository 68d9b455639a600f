"""The layer whose product is an answer of the graph, and whether one scale is enough for its weight.

    x ─► Q ─► DQ ─► MatMul ─► logits        an INT8 GEMM multiplies its sum by one number, and adds nothing
                      ▲
    W ints ─► DQ, s ──┘

TensorRT-RTX 1.7 writes this as one kernel if the weight has one scale, no bias follows, and the answer has the type
that the GEMM writes. A scale for each output channel, a bias or a cast is a second kernel, which there is no other
layer to be a part of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import Linear, find_linears
from exporters.qdq_scales import input_at
from exporters.quantizer import INT8
from exporters.slices import flat_slices

# ‖W − Ŵ‖ / ‖W‖ with one scale. Of classifiers that were trained it is 0.013 to 0.018, of random weights 0.011, and
# a head rounded so loses nothing that was measured (docs/surgery.md); beyond that nothing was.
_ROUNDED_WELL = 0.02


def answering_layers(graph: ir.Graph) -> Iterator[Linear]:
    """Yield the linear layers of `graph` whose product, with or without a bias, is an answer and nothing else."""
    for linear in find_linears(graph):
        answer = linear.node.outputs[0] if bias_of(linear) is None else _biased(linear).outputs[0]
        if linear.kind == "gemm" and answer.is_graph_output() and not answer.uses():
            yield linear


def bias_of(linear: Linear) -> ir.Value | None:
    """The constant [N] that is added to the product, in the layer or right behind it."""
    node = _biased(linear)
    if node is linear.node:
        return input_at(node, 2) if node.op_type == "Gemm" else None
    return next(value for value in node.inputs if value is not linear.node.outputs[0])


def remove_bias(linear: Linear) -> None:
    """Let nothing be added to the product, which answers under the name of the sum."""
    node, product = _biased(linear), linear.node.outputs[0]
    if node is linear.node:
        node.resize_inputs(2)
        return
    graph, total = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    graph.outputs[list(graph.outputs).index(total)] = product
    product.name, total.name = total.name, None
    graph.remove(node, safe=True)


def _biased(linear: Linear) -> ir.Node:
    """The node that gives the layer's result: an Add of a constant behind the product, or the layer itself."""
    product = linear.node.outputs[0]
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output() or uses[0].node.op_type != "Add" or uses[0].node.domain:
        return linear.node
    other = uses[0].node.inputs[1 - uses[0].idx]
    constant = other is not None and other.is_initializer() and not other.is_graph_input()
    return uses[0].node if constant else linear.node


def one_scale_is_enough(values: npt.NDArray[Any]) -> bool:
    """Whether a weight loses little when all its channels are rounded to INT8 with the scale of the largest value."""
    largest = max((float(max(part.max(), -part.min())) for part in flat_slices(values)), default=0.0)
    scale = largest / INT8[1]
    if not 0 < scale < np.inf:
        return False
    error = power = 0.0
    for part in flat_slices(values):
        exact = part.astype(np.float64)
        error += float(np.square(np.rint(exact / scale) * scale - exact).sum())
        power += float(np.square(exact).sum())
    return error <= _ROUNDED_WELL**2 * power
