"""Which floats an operator takes and gives, by ONNX's own type constraints.

| operator, opset 23 | float32 whatever the rest is |
|---|---|
| Resize | `scales`: `tensor(float)`, while X is T1 |
| Range | all: float16 is not in T |
| LayerNormalization | the second and third output: an attribute tells their type |
| ConstantOfShape | the output: an attribute tells its type |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx
import onnx_ir as ir

_FLOATS = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_UNTYPED = frozenset({"Cast", "Shape", "Size"})  # they read any type, and what they give does not depend on it


def reads_any(node: ir.Node) -> bool:
    """Whether the node reads its first input in any type alike."""
    return node.op_type in _UNTYPED and not node.domain


def may_read(node: ir.Node, index: int, dtype: ir.DataType, opset: int) -> bool:
    """Whether input `index` of `node` may be of the float type `dtype`; True for operators that are not ONNX's.

    The scale of TensorRT's FP4 quantizer is float32 all the same: the one that dequantizes must be the same number.
    """
    if node.domain and node.op_type == "TRT_FP4DynamicQuantize":
        return index == 0 or dtype == ir.DataType.FLOAT
    schema = _schema(node, opset)
    return schema is None or f"tensor({_FLOATS[dtype]})" in _types(schema, schema.inputs, index)


def may_give(node: ir.Node, index: int, dtype: ir.DataType, opset: int) -> bool:
    """Whether output `index` of `node` takes the float type `dtype` from an input of that type."""
    schema = _schema(node, opset)
    if schema is None or node.op_type == "DequantizeLinear":  # its output follows the scale
        return True
    formal = schema.outputs[min(index, len(schema.outputs) - 1)]
    from_input = any(formal.type_str == given.type_str for given in schema.inputs)
    return from_input and f"tensor({_FLOATS[dtype]})" in _types(schema, schema.outputs, index)


def _types(
    schema: onnx.defs.OpSchema, formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> frozenset[str]:
    """The types that a schema allows there; the last parameter of a variadic operator stands for all that follow."""
    type_str = formals[min(index, len(formals) - 1)].type_str
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    return frozenset(allowed.get(type_str, [type_str]))


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    return None if node.domain else _schema_of(node.op_type, opset)


@cache
def _schema_of(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
