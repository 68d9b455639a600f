"""Infer the types and shapes of one node's outputs, by onnx's own rules."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_MOST = 64  # elements of a constant that a rule may read, such as the sizes of a Reshape


def infer_shape(node: ir.Node, opset: int) -> None:
    """Set what the rules tell of the outputs; a size that is known already stays.

    Args:
        node: an operator of the standard domain; any other is left as it is, and so is control flow.
        opset: the version of the standard domain.
    """
    inputs = [value for value in node.inputs if value is not None]
    if (
        node.domain
        or any(value.type is None for value in inputs)
        or any(_is_graph(a) for a in node.attributes.values())
    ):
        return
    types = {value.name or "": _type(value) for value in inputs}
    data = {value.name or "": tensor for value in inputs if (tensor := _small_constant(value)) is not None}
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        found = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data)
    except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return
    for value in node.outputs:
        if value.name in found:
            _set(value, found[value.name])


def _set(value: ir.Value, proto: onnx.TypeProto) -> None:
    value.type = ir.serde.deserialize_type_proto_for_type(proto) or value.type
    found, old = ir.serde.deserialize_type_proto_for_shape(proto), value.shape
    if found is None:
        return
    if old is None or len(old) != len(found):
        value.shape = found
        return
    sizes = (was if isinstance(was, int) or not _is_known(new) else new for was, new in zip(old, found, strict=True))
    value.shape = ir.Shape(sizes)


def _is_known(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None


def _type(value: ir.Value) -> onnx.TypeProto:
    assert value.type is not None
    proto = ir.serde.serialize_type(value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _small_constant(value: ir.Value) -> onnx.TensorProto | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > _MOST or value.is_graph_input():
        return None
    return ir.serde.serialize_tensor(tensor)


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
