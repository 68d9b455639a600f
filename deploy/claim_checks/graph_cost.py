"""What a graph costs: weights and multiply-adds of each layer, and of the products of activations.

layer     multiply-adds = positions · weights, positions being the outputs divided by N
MatMul    of two activations: outputs · K
Attention B · S · T · (width of the queries + width of the values)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from exporters.infer_shape import infer_shape
from exporters.linears import QDQ, find_linears
from exporters.module_names import label_of
from profiles.errors import GpusqError


@dataclass(frozen=True)
class LayerCost:
    """One layer with a constant weight."""

    module: str
    k: int
    weights: int
    macs: int


@dataclass(frozen=True)
class GraphCost:
    """A graph at batch 1.

    Attributes:
        name: what the graph is called.
        layers: those with a constant weight.
        product_macs: multiply-adds of products of two activations.
        parameters: of the whole network.
    """

    name: str
    layers: tuple[LayerCost, ...]
    product_macs: int
    parameters: int


def cost_of(model: ir.Model, name: str, parameters: int | None = None) -> GraphCost:
    """Return what `model` costs for one sample.

    Args:
        model: its open axes become 1.
        name: what it is called.
        parameters: of the network, where that is known better than from the graph's constants.

    Raises:
        GpusqError: the size of a product is not known.
    """
    _fix_inputs(model)
    opset = model.opset_imports.get("") or 0
    for node in model.graph:
        infer_shape(node, opset)
    linears = list(find_linears(model.graph))
    layers = tuple(
        LayerCost(x.module, x.k, prod(x.shape), _positions(x.node, x.n, x.activation_input) * prod(x.shape))
        for x in linears
    )
    nodes = {linear.node for linear in linears}
    products = sum(_product(node) for node in model.graph if node not in nodes and not node.domain)
    return GraphCost(name, layers, products, _parameters(model) if parameters is None else parameters)


def _fix_inputs(model: ir.Model) -> None:
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else 1 for dim in value.shape])


def _positions(node: ir.Node, n: int, activation_input: int) -> int:
    if node.op_type == "ConvTranspose":
        dims = _dims(node, node.inputs[activation_input])
        return prod(dims) // dims[1]
    return prod(_dims(node, node.outputs[0])) // n


def _product(node: ir.Node) -> int:
    if node.op_type == "MatMul":
        return prod(_dims(node, node.outputs[0])) * _dims(node, node.inputs[0])[-1]
    if node.op_type == "Attention":
        query, key, value = (_dims(node, tensor) for tensor in node.inputs[:3])
        heads = query[1] if len(query) == 4 else 1
        return query[0] * heads * query[-2] * key[-2] * (query[-1] + value[-1])
    return 0


def _dims(node: ir.Node, value: ir.Value | None) -> tuple[int, ...]:
    shape = None if value is None else value.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        raise GpusqError(
            f"the size of {label_of(node)} is not known", hint="export the model with a fixed batch: no --dynamic"
        )
    return tuple(int(dim) for dim in shape if isinstance(dim, int))


def _parameters(model: ir.Model) -> int:
    return sum(value.const_value.size for value in _weights(model) if value.const_value is not None)


def _weights(model: ir.Model) -> Iterator[ir.Value]:
    """Every constant of the network itself: neither a scale or zero-point, nor a shape."""
    qdq = {value for node in model.graph if node.op_type in QDQ for value in node.inputs[1:]}
    for value in model.graph.initializers.values():
        if value not in qdq and value.dtype != ir.DataType.INT64:
            yield value
