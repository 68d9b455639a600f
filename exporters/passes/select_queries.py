"""Attend with the queries whose results are read, and with no others.

    Gather(Reshape(Transpose(Attention(q, k, v))), row)   →   Reshape(Transpose(Attention(Slice(q, row), k, v)))

A query's result depends on no other query: the attention of the last block of a classifier runs for one token. An INT8
attention kernel takes two queries at least; then a neighbour goes with the row, through the projection, the
normalization and the next layer, up to what that one's activation function gives:

    Gather(attention) ─► Linear ─► +x ─► LayerNorm ─► Linear ─► Gelu ─► Linear
    attention, two rows ─► Linear ─► +x ─► LayerNorm ─► Linear ─► Gelu ─► Gather ─► Linear

There the selection is a part of the kernel that computes the activation function; ahead of the projection, or of a
normalization, it is a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.select_early import NORMALIZATIONS, is_each_element, row_of, selects_one_row, works_on_each_row
from exporters.qdq_scales import input_at


@dataclass(frozen=True)
class SelectQueries:
    """Keep `queries` of them in every 4-D Attention of whose result a single row is read."""

    queries: int = 1

    def __call__(self, model: ir.Model) -> Outcome:
        """Keep them; masks that tell queries apart, causality and caches are left alone with the reason."""
        inserter = Inserter(model.graph)
        changes: list[Change] = []
        left: list[LeftAlone] = []
        for node in [node for node in model.graph if node.op_type == "Attention" and not node.domain]:
            read = _read_row(node)
            if read is None or read.tokens <= self.queries:
                continue
            if why := _why_not(node):
                left.append(LeftAlone(label_of(node), why))
                continue
            start = min(read.row, read.tokens - self.queries)
            behind = _behind(read, model.graph) if self.queries > 1 else {}
            if behind is None:
                left.append(LeftAlone(label_of(node), "what follows it works on more than each row"))
                continue
            _narrow(node, read, start, self.queries, inserter)
            if behind:
                _select_later(read, behind, start, self.queries, inserter)
            changes.append(Change(label_of(node), f"{self.queries} of {read.tokens} queries"))
        return Outcome("select queries", len(changes), tuple(left), tuple(changes))


@dataclass(frozen=True)
class _ReadRow:
    """How one row of an attention's `tokens` rows is read."""

    transpose: ir.Node
    reshape: ir.Node
    gather: ir.Node
    row: int
    tokens: int
    width: int


def _read_row(attention: ir.Node) -> _ReadRow | None:
    """The Transpose, the Reshape and the Gather behind `attention`, if nothing else reads its result."""
    transpose = _only_reader(attention.outputs[0], "Transpose")
    reshape = None if transpose is None else _only_reader(transpose.outputs[0], "Reshape")
    gather = None if reshape is None else _only_reader(reshape.outputs[0], "Gather")
    if transpose is None or reshape is None or gather is None or not selects_one_row(gather):
        return None
    shape, (axis, row) = reshape.outputs[0].shape, row_of(gather)
    perm = list(transpose.attributes.get_ints("perm", []))
    if perm != [0, 2, 1, 3] or shape is None or len(shape) != 3 or axis != 1:
        return None
    tokens, width = shape[1], shape[2]
    if not isinstance(tokens, int) or not isinstance(width, int):
        return None
    return _ReadRow(transpose, reshape, gather, row % tokens, tokens, width)


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0][0].op_type != op_type or uses[0][1] != 0:
        return None
    return uses[0][0]


def _why_not(attention: ir.Node) -> str:
    if any(value is not None for value in attention.inputs[4:]):
        return "it has a key/value cache"
    if any(value.uses() or value.is_graph_output() for value in attention.outputs[1:]):
        return "its second output is read"
    if attention.attributes.get_int("is_causal", 0):
        return "it is causal"
    mask = input_at(attention, 3)
    if mask is not None and (mask.shape is None or (len(mask.shape) > 1 and mask.shape[-2] != 1)):
        return "its mask tells queries apart"
    q = attention.inputs[0]
    return "" if q is not None and q.shape is not None and len(q.shape) == 4 else "its query is not 4-D"


def _narrow(attention: ir.Node, read: _ReadRow, start: int, queries: int, inserter: Inserter) -> None:
    """Slice the query, and let what follows have that many rows."""
    q = attention.inputs[0]
    assert q is not None
    attention.replace_input_with(0, _sliced(q, 2, start, queries, attention, inserter))
    for output, axis in ((attention.outputs[0], 2), (read.transpose.outputs[0], 1), (read.reshape.outputs[0], 1)):
        output.shape = _with_length(output.shape, axis, queries)
    target = np.asarray([0, queries, read.width], np.int64)
    read.reshape.replace_input_with(1, inserter.initializer(f"{label_of(attention)}.selected", target))
    read.reshape.attributes.pop("allowzero", None)
    index = inserter.initializer("selected_row", np.asarray(read.row - start, np.int64))
    read.gather.replace_input_with(1, index)


def _with_length(shape: ir.Shape | None, axis: int, length: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([length if at == axis else dim for at, dim in enumerate(shape)])


def _sliced(value: ir.Value, axis: int, start: int, length: int, before: ir.Node, inserter: Inserter) -> ir.Value:
    bounds = (("start", start), ("end", start + length), ("axis", axis))
    ends = [inserter.initializer(f"selected_{name}_{at}", np.asarray([at], np.int64)) for name, at in bounds]
    assert value.dtype is not None
    return inserter.node(
        "Slice",
        [value, *ends],
        dtype=value.dtype,
        module=before.metadata_props.get(MODULE_KEY, ""),
        before=before,
        shape=_with_length(value.shape, axis, length),
    )


def _behind(read: _ReadRow, graph: ir.Graph) -> dict[ir.Node, None] | None:
    """What works on several rows, in order, up to a layer that reads what only activation functions have made.

    None where no such layer is reached.
    """
    rows = {read.gather.outputs[0]}
    widened: dict[ir.Node, None] = {}
    reached = False
    for node in graph:
        if not rows.intersection(node.inputs):
            continue
        if _is_linear(node) and _is_activation(node.inputs[0], widened):
            reached = True
        elif _can_widen(node, rows, read):
            widened[node] = None
            rows.add(node.outputs[0])
    return widened if reached else None


def _is_linear(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm") and not node.domain


def _is_activation(value: ir.Value | None, widened: Mapping[ir.Node, None]) -> bool:
    """Whether nothing but elementwise operators lies between `value` and layers that are widened."""
    node = None if value is None else value.producer()
    if node is None or node not in widened:
        return value is None or value.is_initializer()
    return _is_linear(node) or (is_each_element(node) and all(_is_activation(x, widened) for x in node.inputs))


def _can_widen(node: ir.Node, rows: set[ir.Value], read: _ReadRow) -> bool:
    """Whether `node` works on each row, and all that it reads has the rows or is selected from them in the same way."""
    shape = node.outputs[0].shape
    if shape is None or node.outputs[0].is_graph_output() or len(node.outputs) != 1:
        return False
    if node.op_type in NORMALIZATIONS and node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
        return False
    given = [value for value in node.inputs if value is not None and not value.is_initializer()]
    return works_on_each_row(node, len(shape)) and all(value in rows or _selection(value, read) for value in given)


def _selection(value: ir.Value, read: _ReadRow) -> ir.Node | None:
    """The Gather that selects the same row of another tensor, for `value`."""
    node = value.producer()
    if node is None or not selects_one_row(node):
        return None
    x = node.inputs[0]
    tokens = None if x is None or x.shape is None else x.shape[1]
    axis, row = row_of(node)
    return node if tokens == read.tokens and axis == 1 and row % read.tokens == read.row else None


def _select_later(read: _ReadRow, behind: Iterable[ir.Node], start: int, queries: int, inserter: Inserter) -> None:
    """Let the nodes `behind` work on all the rows, and select where the others read."""
    wide = {read.gather.outputs[0]: read.reshape.outputs[0]}
    narrow = dict.fromkeys(behind)
    for node in narrow:
        for index, value in enumerate(node.inputs):
            if value in wide:
                node.replace_input_with(index, wide[value])
            elif value is not None and (gather := _selection(value, read)) is not None:
                x = gather.inputs[0]
                assert x is not None
                wide[value] = _sliced(x, 1, start, queries, node, inserter)
                node.replace_input_with(index, wide[value])
        wide[node.outputs[0]] = node.outputs[0]
        _widen(node.outputs[0], queries)
        if node.op_type in NORMALIZATIONS:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
    for node in narrow:
        outside = [(user, index) for user, index in node.outputs[0].uses() if user not in narrow]
        if outside:
            selected = _selected(node.outputs[0], read.gather, outside, inserter)
            for user, index in outside:
                user.replace_input_with(index, selected)
    inserter.graph.remove(read.gather, safe=True)
    for gather in _unread(wide):
        inserter.graph.remove(gather, safe=True)


def _unread(wide: Mapping[ir.Value, ir.Value]) -> Iterator[ir.Node]:
    for value in wide:
        node = value.producer()
        if node is not None and node.graph is not None and node.op_type == "Gather" and not value.uses():
            yield node


def _widen(value: ir.Value, rows: int) -> None:
    assert value.shape is not None
    value.shape = ir.Shape([value.shape[0], rows, *list(value.shape)[1:]])


def _selected(value: ir.Value, like: ir.Node, readers: Iterable[tuple[ir.Node, int]], inserter: Inserter) -> ir.Value:
    first = min((user for user, _ in readers), key=list(inserter.graph).index)
    index = like.inputs[1]
    assert value.dtype is not None
    assert value.shape is not None
    assert index is not None
    return inserter.node(
        "Gather",
        [value, index],
        dtype=value.dtype,
        module=first.metadata_props.get(MODULE_KEY, ""),
        attributes={"axis": 1},
        before=first,
        shape=ir.Shape([dim for at, dim in enumerate(value.shape) if at != 1]),
    )
