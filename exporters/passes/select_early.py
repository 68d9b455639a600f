"""Select the rows that are read before they are computed, and compute no others.

    Gather(LayerNorm(x + Linear(y)), row, axis=1)   →   LayerNorm(Gather(x, row) + Linear(Gather(y, row)))

A classifier reads one token of the last block. What works on each token by itself, LayerNormalization, linear layers,
activations and sums, gives the same numbers for that token alone: the whole MLP of the last block then runs for one
token instead of all. The selection moves up to what mixes tokens, the attention, and stops there.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.linears import QDQ, array_shape, trace_back
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Outcome

_EACH_ELEMENT = QDQ | {
    "Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Clip", "Cast", "Identity",
}  # fmt: skip
_EACH_ROW = frozenset({"LayerNormalization", "RMSNormalization"})


@dataclass(frozen=True)
class SelectEarly:
    """Move every Gather of one row, along an axis that is neither the batch nor the last, as far up as it goes."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Move them."""
        inserter = Inserter(model.graph)
        waiting = [node for node in model.graph if _selects_one_row(node)]
        moved = 0
        while waiting:
            gather = waiting.pop(0)
            above = _node_that_works_on_each_row(gather)
            if above is not None:
                waiting.extend(node for node in _move(gather, above, inserter) if node not in waiting)
                moved += 1
        return Outcome("select early", moved)


def _selects_one_row(node: ir.Node) -> bool:
    x = node.inputs[0] if node.op_type == "Gather" and not node.domain else None
    index = None if x is None else ir.convenience.get_const_tensor(node.inputs[1])  # type: ignore[arg-type]
    if x is None or x.shape is None or index is None or len(index.shape) != 0:
        return False
    return 0 < node.attributes.get_int("axis", 0) < len(x.shape) - 1


def _node_that_works_on_each_row(gather: ir.Node) -> ir.Node | None:
    """What makes the rows, if it makes each from the same rows of its inputs, for this reader alone."""
    x = gather.inputs[0]
    node = None if x is None else x.producer()
    if x is None or node is None or node.domain or len(x.uses()) != 1 or x.is_graph_output() or x.shape is None:
        return None
    rank = len(x.shape)
    rest = [value for value in node.inputs if value is not None and value not in _rows_of(node, rank)]
    if any(not value.is_initializer() or len(array_shape(value)) > 1 for value in rest if node.op_type != "MatMul"):
        return None
    if node.op_type in _EACH_ELEMENT:
        return node if len(rest) < len(node.inputs) else None
    if node.op_type in _EACH_ROW:
        return node if node.attributes.get_int("axis", -1) in (-1, rank - 1) else None
    if node.op_type == "MatMul":
        weight, _ = trace_back(node.inputs[1])
        return node if weight is not None and weight.is_initializer() and len(array_shape(weight)) == 2 else None
    return None


def _rows_of(node: ir.Node, rank: int) -> list[ir.Value]:
    """The inputs whose rows are the rows of the output."""
    candidates = node.inputs[:1] if node.op_type in _EACH_ROW or node.op_type == "MatMul" else node.inputs
    return [
        value
        for value in candidates
        if value is not None and not value.is_initializer() and value.shape is not None and len(value.shape) == rank
    ]


def _move(gather: ir.Node, above: ir.Node, inserter: Inserter) -> list[ir.Node]:
    """Select in the inputs of `above` instead of in its output; return the new selections."""
    axis = gather.attributes.get_int("axis", 0)
    selected = gather.outputs[0]
    output = above.outputs[0]
    rank = len(output.shape or ())
    moved: list[ir.Node] = []
    for value in dict.fromkeys(_rows_of(above, rank)):
        node = _selection(value, gather, axis, above, inserter)
        for index, read in enumerate(above.inputs):
            if read is value:
                above.replace_input_with(index, node.outputs[0])
        moved.append(node)
    output.shape = selected.shape
    inserter.replace(gather, output)
    return moved


def _selection(value: ir.Value, like: ir.Node, axis: int, before: ir.Node, inserter: Inserter) -> ir.Node:
    """The node that selects the same row of `value`: the one that is there already, or a new one."""
    for user, _ in value.uses():
        if user.op_type == "Gather" and user.inputs[1] is like.inputs[1] and user.attributes.get_int("axis", 0) == axis:
            producer = value.producer()
            if producer is not None:
                inserter.graph.remove(user)
                inserter.graph.insert_after(producer, user)
            return user
    assert value.dtype is not None
    assert value.shape is not None
    row = inserter.node(
        "Gather",
        [value, like.inputs[1]],  # type: ignore[list-item]
        dtype=value.dtype,
        module=before.metadata_props.get(MODULE_KEY, ""),
        attributes={"axis": axis},
        before=before,
        shape=ir.Shape([dim for index, dim in enumerate(value.shape) if index != axis]),
    )
    node = row.producer()
    assert node is not None
    return node
