"""Name the axes of every tensor by what the inputs tell, and forget all other names.

    x [batch, 197, 384] ─► Reshape ─► [None, 197, 3, 6, 64]         [batch, 197, 3, 6, 64]
    x [batch, …] ─► windows ─► [4*batch, 49, 96]               →    [None, 49, 96]

Passes that insert a node know more or less about an axis than those that find the node there already, so that the same
nodes would carry other names after a second surgery. Sizes that are known stay. Names of inputs and outputs stay too:
they are the model's interface.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.infer_shape import infer_shape
from exporters.passes.outcome import Outcome


@dataclass(frozen=True)
class NameAxes:
    """Let the names of axes depend on nothing but the nodes and the inputs; the last pass."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Name them; nothing is counted, since no node and no number changes."""
        opset = model.opset_imports.get("") or 1
        for node in model.graph:
            for value in node.outputs:
                _forget(value)
            infer_shape(node, opset)
        return Outcome("name axes", 0)


def _forget(value: ir.Value) -> None:
    """Take the names out of a shape between two nodes."""
    if value.shape is not None and not value.is_graph_output():
        value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])
