"""The attentions of a graph: `Attention` nodes, and Softmax nodes whose weights multiply values.

Softmax → (Cast, Q/DQ, guards against NaN, reshapes) → MatMul(·, values)      an attention
Softmax → graph output, TopK, MatMul(·, a constant)                           a classifier's or detector's head

A plan is judged by them: each should have become one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from exporters.linears import QDQ

_MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Identity", "Dropout"})
_PASSES_ON = QDQ | _MOVES | {"Cast", "Where"}
_PRODUCTS = frozenset({"MatMul", "Einsum"})


def find_attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the node at the heart of each attention, in the order of `graph`: the operator itself, or the Softmax."""
    for node in graph:
        if node.domain:
            continue
        if node.op_type == "Attention" or (node.op_type == "Softmax" and _weighs_values(node)):
            yield node


def _weighs_values(softmax: ir.Node) -> bool:
    """Whether the output is the first operand of a product whose second one is computed."""
    ahead, seen = [softmax.outputs[0]], set[ir.Value]()
    while ahead:
        value = ahead.pop()
        seen.add(value)
        for user, index in value.uses():
            if user.op_type in _PRODUCTS and index == 0 and not _is_constant(user.inputs[1]):
                return True
            if user.op_type in _PASSES_ON:
                ahead.extend(output for output in user.outputs if output not in seen)
    return False


def _is_constant(value: ir.Value | None) -> bool:
    """Whether it is a constant, stored as it is or behind its DequantizeLinear."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _PASSES_ON:
        value = node.inputs[0]
    return value is not None and ir.convenience.get_const_tensor(value) is not None
