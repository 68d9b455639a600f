"""Put one operator where others computed the same."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Attributes, Inserter


def put_in_place(
    inserter: Inserter, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], attributes: Attributes | None = None
) -> ir.Value:
    """Let a new node take the place of `node`: its module, and the name, type and shape of its first output.

    What led to the old node stays until `drop_unused`.
    """
    old = node.outputs[0]
    dtype = old.dtype or inputs[0].dtype
    assert dtype is not None
    name, module = old.name, node.metadata_props.get(MODULE_KEY, "")
    new = inserter.node(
        op_type, inputs, dtype=dtype, module=module, attributes=attributes, before=node, shape=old.shape
    )
    inserter.replace(node, new)
    new.name = name
    return new


def drop_unused(model: ir.Model) -> None:
    """Remove the nodes and constants that nothing reads any more."""
    RemoveUnusedNodesPass()(model)
