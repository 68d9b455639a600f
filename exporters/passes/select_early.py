"""Select the rows that are read before they are computed, and compute no others.

    Gather(LayerNorm(x + Linear(y)), row, axis=1)   →   LayerNorm(Gather(x, row) + Linear(Gather(y, row)))

A classifier reads one token of the last block. What works on each token by itself, LayerNormalization, linear layers,
activations and sums, gives the same numbers for that token alone: the whole MLP of the last block then runs for one
token instead of all. The selection moves up to what mixes tokens, the attention, and stops there; one of two rows
stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.linears import QDQ, array_of, array_shape, trace_back
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Outcome

_EACH_ELEMENT = QDQ | {
    "Add", "Sub", "Mul", "Div", "Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Clip", "Cast", "Identity",
}  # fmt: skip
FEW = 2  # so many rows cost no more than one, and `select_queries` leaves as many
NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization"})


@dataclass(frozen=True)
class SelectEarly:
    """Move every Gather of one row, along an axis that is neither the batch nor the last, as far up as it goes."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Move them."""
        inserter = Inserter(model.graph)
        waiting = [node for node in model.graph if selects_one_row(node)]
        moved = 0
        while waiting:
            gather = waiting.pop(0)
            above = _node_that_works_on_each_row(gather)
            if above is not None:
                waiting.extend(node for node in _move(gather, above, inserter) if node not in waiting)
                moved += 1
        return Outcome("select early", moved)


def selects_one_row(node: ir.Node) -> bool:
    """Whether it is a Gather of one row, along an axis that is neither the batch nor the last."""
    if node.op_type != "Gather" or node.domain or node.inputs[0] is None or node.inputs[0].shape is None:
        return False
    index = node.inputs[1]
    scalar = index is not None and _is_constant(index) and array_shape(index) == ()
    return scalar and 0 < _axis(node) < len(node.inputs[0].shape) - 1


def _axis(gather: ir.Node) -> int:
    """The axis that it selects along, counted from the front."""
    axis = gather.attributes.get_int("axis", 0)
    x = gather.inputs[0]
    return axis + len(x.shape) if axis < 0 and x is not None and x.shape is not None else axis


def row_of(gather: ir.Node) -> tuple[int, int]:
    """The axis of a Gather of one row, and its index there."""
    index = gather.inputs[1]
    assert index is not None
    return _axis(gather), int(array_of(index).item())


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _node_that_works_on_each_row(gather: ir.Node) -> ir.Node | None:
    """What makes the rows, if it makes each from the same rows of its inputs, for this reader alone."""
    x = gather.inputs[0]
    node = None if x is None else x.producer()
    if x is None or node is None or node.domain or len(x.uses()) != 1 or x.is_graph_output() or x.shape is None:
        return None
    rows = x.shape[_axis(gather)]
    if isinstance(rows, int) and rows <= FEW:
        return None
    if any(output.uses() or output.is_graph_output() for output in node.outputs if output is not x):
        return None
    inputs = _rows_of(node)
    same = all(_has_rows_of(value, x, _axis(gather), alone=len(inputs) == 1) for value in inputs)
    return node if inputs and same and works_on_each_row(node, len(x.shape)) else None


def is_each_element(node: ir.Node) -> bool:
    """Whether it computes each element of its result from the same element of its inputs."""
    return node.op_type in _EACH_ELEMENT and not node.domain


def works_on_each_row(node: ir.Node, rank: int) -> bool:
    """Whether nothing in `node`, whose output has `rank` axes, mixes rows or tells them apart."""
    if node.op_type == "MatMul":
        weight, _ = trace_back(node.inputs[1])
        return weight is not None and _is_constant(weight) and len(array_shape(weight)) == 2
    if node.op_type in NORMALIZATIONS and node.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return False
    axes = 0 if node.op_type in QDQ else 1  # a scale for each channel would have to follow its axis
    constants = [value for value in node.inputs if value is not None and value not in _rows_of(node)]
    return node.op_type in _EACH_ELEMENT | NORMALIZATIONS and all(
        _is_constant(value) and len(array_shape(value)) <= axes for value in constants
    )


def _rows_of(node: ir.Node) -> list[ir.Value]:
    """The inputs whose rows are the rows of the output."""
    first_only = node.op_type in NORMALIZATIONS | QDQ | {"MatMul", "Clip"}
    candidates = node.inputs[:1] if first_only else node.inputs
    return [value for value in dict.fromkeys(candidates) if value is not None and not _is_constant(value)]


def _has_rows_of(value: ir.Value, x: ir.Value, axis: int, *, alone: bool) -> bool:
    """Whether `value` has the rows of the result `x`, none of them broadcast; one that is `alone` cannot be."""
    if value.shape is None or value.dtype is None or x.shape is None or len(value.shape) != len(x.shape):
        return False
    length = x.shape[axis]
    known = isinstance(length, int) or length.value is not None
    return alone or (known and value.shape[axis] == length)


def _move(gather: ir.Node, above: ir.Node, inserter: Inserter) -> list[ir.Node]:
    """Select in the inputs of `above` instead of in its output; return the new selections."""
    selected, output = gather.outputs[0], above.outputs[0]
    moved: list[ir.Node] = []
    for value in _rows_of(above):
        node = _selection(value, gather, above, inserter)
        for index, read in enumerate(above.inputs):
            if read is value:
                above.replace_input_with(index, node.outputs[0])
        moved.append(node)
    if above.op_type in NORMALIZATIONS:
        above.attributes["axis"] = ir.AttrInt64("axis", -1)
    output.shape = selected.shape
    inserter.replace(gather, output)
    return moved


def _selection(value: ir.Value, like: ir.Node, before: ir.Node, inserter: Inserter) -> ir.Node:
    """The node that selects the same row of `value`: the one that is there already, or a new one."""
    graph, producer = inserter.graph, value.producer()
    for user, index in value.uses():
        if index == 0 and selects_one_row(user) and row_of(user) == row_of(like):
            graph.remove(user)
            if producer is None:
                graph.insert_before(graph[0], user)
            else:
                graph.insert_after(producer, user)
            return user
    assert value.dtype is not None
    assert value.shape is not None
    row = inserter.node(
        "Gather",
        [value, like.inputs[1]],  # type: ignore[list-item]
        dtype=value.dtype,
        module=before.metadata_props.get(MODULE_KEY, ""),
        attributes={"axis": _axis(like)},
        before=before,
        shape=ir.Shape([dim for index, dim in enumerate(value.shape) if index != _axis(like)]),
    )
    node = row.producer()
    assert node is not None
    return node
