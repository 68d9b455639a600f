"""A copy of a graph as it would be without the quantizers that a placement has just given it."""

from __future__ import annotations

import onnx_ir as ir

from exporters.passes.inserter import Inserter
from exporters.quantizer import DOMAIN, OPERATOR


def float_twin(model: ir.Model) -> ir.Model:
    """Return a copy of `model` without its `gpusq::FakeQuantize`; names and trained Q/DQ are the same."""
    twin = model.clone()
    inserter = Inserter(twin.graph)
    for node in [node for node in twin.graph if is_fake_quantizer(node)]:
        source = node.inputs[0]
        assert source is not None
        name = source.name
        inserter.replace(node, source)
        source.name = name
    return twin


def is_fake_quantizer(node: ir.Node | None) -> bool:
    """Whether a node is a quantizer that is not lowered to Q/DQ yet."""
    return node is not None and node.domain == DOMAIN and node.op_type == OPERATOR
