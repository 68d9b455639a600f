"""The activations that a placement quantizes beside the inputs of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporters.linears import Linear, array_shape, trace_weight
from exporters.module_names import label_of
from exporters.passes.outcome import LeftAlone


@dataclass(frozen=True)
class Read:
    """An activation where it is read.

    Attributes:
        value: what is read.
        node: what reads it.
        index: which input of the node.
        place: its name.
        amax: its largest absolute value, where that is known without measuring.
    """

    value: ir.Value
    node: ir.Node
    index: int
    place: str
    amax: float | None = None


def residuals(graph: ir.Graph, linears: Sequence[Linear]) -> Iterator[Read]:
    """The identity branch of each sum that ends the branch of one of the convolutions in `linears`."""
    convolutions = {linear.node for linear in linears if linear.kind == "conv"}
    for node in graph:
        if node.op_type != "Add" or node.domain or None in node.inputs:
            continue
        first, second = node.inputs
        if first is None or second is None or first.is_initializer() or second.is_initializer():
            continue
        for index, (branch, identity) in enumerate(((second, first), (first, second))):
            if branch.producer() in convolutions and len(branch.uses()) == 1 and not branch.is_graph_output():
                yield Read(identity, node, index, f"{label_of(node)}.identity")
                break


def outputs(linears: Sequence[Linear]) -> Iterator[Read]:
    """What reads the result of each linear layer, bias included; what the graph answers stays float."""
    for linear in (linear for linear in linears if linear.kind == "gemm"):
        value = linear.node.outputs[0]
        users = [user for user, _ in value.uses()]
        if len(users) == 1 and users[0].op_type == "Add" and any(_is_bias(x) for x in users[0].inputs):
            value = users[0].outputs[0]
        for user, index in list(value.uses()):
            yield Read(value, user, index, f"{linear.module}.output")


def attention_products(
    graph: ir.Graph, left: list[LeftAlone], why_not: Callable[[ir.Node, ir.Value, ir.Value], str]
) -> Iterator[Read]:
    """The four inputs of the two products of each attention that a kernel can fuse; the others are left.

    `why_not` tells of a softmax, its q and its v why there is no such kernel, "" where there is.
    """
    for softmax in [node for node in graph if node.op_type == "Softmax" and not node.domain]:
        found = _products(softmax)
        if found is None:
            continue
        (q, scores), (k, _), (v, product) = found
        if why := why_not(softmax, q, v):
            left.append(LeftAlone(label_of(softmax), why))
            continue
        place = label_of(softmax)
        yield Read(q, scores, 0, f"{place}.q")
        yield Read(k, scores, 1, f"{place}.k")
        yield Read(softmax.outputs[0], product, 0, f"{place}.softmax", 1.0)
        yield Read(v, product, 1, f"{place}.v")


def _products(softmax: ir.Node) -> tuple[tuple[ir.Value, ir.Node], ...] | None:
    """q, k and v, each with the product that reads it; None where a softmax is in no attention."""
    users = [user for user, index in softmax.outputs[0].uses() if user.op_type == "MatMul" and index == 0]
    scores = _scores(softmax.inputs[0])
    if len(users) != 1 or scores is None:
        return None
    q, k, v = (*scores.inputs, users[0].inputs[1])
    if q is None or k is None or v is None or any(_is_constant(value) for value in (q, k, v)):
        return None
    return (q, scores), (k, scores), (v, users[0])


def _scores(value: ir.Value | None) -> ir.Node | None:
    """The product of q and k, behind casts and masks that are added."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Add", "Cast"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "MatMul" else None


def _is_constant(value: ir.Value) -> bool:
    constant, _ = trace_weight(value)
    return constant is not None and constant.is_initializer()


def _is_bias(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and len(array_shape(value)) == 1
