"""A bfloat16 graph for a runtime that has no bfloat16 kernels: each operator in float32, its result rounded.

    a, b (bf16) ─► MatMul ─► y (bf16)
    a, b (f32)  ─► MatMul ─► Cast bf16 ─► Cast f32 ─► y (f32)          constants are widened, which is exact

onnxruntime's CPU provider is such a runtime: it casts, and has hardly another kernel. The numbers are those of kernels
that read and write bfloat16 and accumulate in float32, which is what tensor cores do.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.derived_tensor import derived_tensor
from exporters.linears import array_shape
from exporters.passes.inserter import Inserter

BF16, F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def holds_bfloat16(model: ir.Model) -> bool:
    """Whether an operator of the main graph gives bfloat16."""
    return any(value.dtype == BF16 for node in model.graph for value in node.outputs)


def emulate_bfloat16(model: ir.Model) -> None:
    """Rewrite the main graph of `model`, in place; its inputs and outputs become float32 as well."""
    graph = model.graph
    inserter = Inserter(graph)
    for value in graph.initializers.values():
        if value.dtype == BF16 and (tensor := value.const_value) is not None:
            value.const_value = derived_tensor([tensor], _widened, F32, array_shape(value), value.name)
            value.type = ir.TensorType(F32)
    nodes: list[ir.Node | None] = [*graph, None]
    for value in graph.inputs:
        if value.dtype == BF16:
            _round(inserter, value, nodes[0])
    for node, following in itertools.pairwise(nodes):
        assert node is not None
        if node.op_type == "Cast" and not node.domain and node.attributes["to"].as_int() == BF16:
            node.attributes["to"] = ir.AttrInt64("to", int(F32))
        for value in node.outputs:
            if value.dtype == BF16:
                _round(inserter, value, following)


def _widened(array: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    return array.astype(np.float32)


def _round(inserter: Inserter, value: ir.Value, before: ir.Node | None) -> None:
    """Make `value` float32, and let all that read it read that rounded to bfloat16 and widened again."""
    value.type = ir.TensorType(F32)
    uses = list(value.uses())
    rounded = value
    for dtype in (BF16, F32):
        rounded = inserter.node(
            "Cast", [rounded], dtype=dtype, module="", attributes={"to": int(dtype)}, before=before, shape=value.shape
        )
    for user, index in uses:
        user.replace_input_with(index, rounded)
    if value.is_graph_output():
        name, value.name = value.name, f"{value.name}_unrounded"
        rounded.name = name
        for index, output in enumerate(inserter.graph.outputs):
            if output is value:
                inserter.graph.outputs[index] = rounded
