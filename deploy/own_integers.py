"""A copy of a model where each product has integers of its own, for a runtime that cannot share them.

    W int8 ─┬► DQ ─► MatMul            W int8   ─► DQ ─► MatMul
            └► DQ ─► MatMul     →      W int8'  ─► DQ ─► MatMul

onnxruntime's exact 8-bit arithmetic (`session.x64quantprecision`) stores weights as uint8, by an optimizer that fails
where it meets one a second time: "Attempt to replace the existing tensor". The model keeps one; what is loaded has two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from exporters.passes.put_in_place import drop_unused


def with_own_integers(model: Path, folder: Path) -> Path | None:
    """Write a copy of `model` into `folder` and return its path; None where it shares no integers."""
    copy = ir.load(model)
    shared = [reads for value in copy.graph.initializers.values() if len(reads := list(_reads(value))) > 1]
    for reads in shared:
        for count, read in enumerate(reads[1:], 2):
            _separate(copy.graph, *read, count)
    if not shared:
        return None
    drop_unused(copy)
    ir.save(copy, folder / "model.onnx", external_data="model.data")
    return folder / "model.onnx"


def _reads(integers: ir.Value) -> Iterator[tuple[ir.Node, ir.Node, int]]:
    """What dequantizes an INT8 constant, once for each node that reads what it gives, and which of its inputs."""
    for dq, index in integers.uses():
        if dq.op_type == "DequantizeLinear" and index == 0 and integers.dtype == ir.DataType.INT8:
            yield from ((dq, user, at) for user, at in dq.outputs[0].uses())


def _separate(graph: ir.Graph, dq: ir.Node, user: ir.Node, index: int, count: int) -> None:
    """Give `user` integers, a zero-point and a DequantizeLinear of its own."""
    old = dq.outputs[0]
    inputs = [_own(graph, value) if at != 1 else value for at, value in enumerate(dq.inputs)]
    attributes = {name: attribute.value for name, attribute in dq.attributes.items()}
    copied = ir.node(dq.op_type, inputs, attributes=attributes)
    copied.name, copied.outputs[0].name = f"{dq.name}_own_{count}", f"{old.name}_own_{count}"
    copied.outputs[0].type, copied.outputs[0].shape = old.type, old.shape
    graph.insert_before(user, copied)
    user.replace_input_with(index, copied.outputs[0])


def _own(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    """A copy of a constant."""
    if value is None or not value.is_initializer():
        return value
    own = ir.Value(name=f"{value.name}_own_{len(graph.initializers)}", const_value=value.const_value, type=value.type)
    own.shape = value.shape
    graph.register_initializer(own)
    return own
