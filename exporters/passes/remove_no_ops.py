"""Remove operators that change nothing, and let chains of data movement be one operator.

    x ─► Identity · Dropout · Pad of zeros · Cast to its own type · Concat of one            →  x
    x ─► Transpose, Reshape, Expand, Slice to the shape that x has already                   →  x
    x ─► Transpose p ─► Transpose q      →  x ─► Transpose r,   r[i] = p[q[i]]
    x ─► Reshape · Flatten · Squeeze · Unsqueeze ─► Reshape s      →  x ─► Reshape s
    x ─► Cast t ─► Cast u                →  x ─► Cast u,        where t holds every number of x's type

A graph's outputs keep their names, and nothing moves between an input and an output of the graph or into a subgraph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.number_types import holds
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused
from exporters.qdq_scales import constant_of, input_at

_TO_THE_END = 2**31 - 1
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class RemoveNoOps:
    """Remove them."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Remove them; counted are the operators removed or shortened."""
        inserter, changed = Inserter(model.graph), 0
        while found := sum(_shorten(node, inserter) or _remove(node, model.graph) for node in list(model.graph)):
            changed += found
            drop_unused(model)
        return Outcome("remove no-ops", changed)


def _remove(node: ir.Node, graph: ir.Graph) -> bool:
    """Let the readers of a node that changes nothing read its input; whether that was possible."""
    if node.domain or node.op_type not in _NO_OPS or not _NO_OPS[node.op_type](node):
        return False
    source, output = node.inputs[0], node.outputs[0]
    if source is None or any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return False
    if output.is_graph_output() and not _may_be_output(source):
        return False
    if output.is_graph_output():
        for index in [index for index, value in enumerate(graph.outputs) if value is output]:
            graph.outputs[index] = source
        source.name, output.name = output.name, None
        source.shape = source.shape if output.shape is None else output.shape
    ir.convenience.replace_all_uses_with(output, source)
    graph.remove(node, safe=True)
    return True


def _may_be_output(value: ir.Value) -> bool:
    """Whether a value may take the name of an output: it is no input, no constant and no output itself."""
    return value.producer() is not None and not value.is_graph_output()


def _is_dropout(node: ir.Node) -> bool:
    given = input_at(node, 2)
    training = constant_of(given)
    return given is None or (training is not None and not training.any())


def _is_empty_pad(node: ir.Node) -> bool:
    pads = constant_of(input_at(node, 1))
    return pads is not None and not pads.any()


def _is_same_cast(node: ir.Node) -> bool:
    source = node.inputs[0]
    return source is not None and source.dtype == node.attributes["to"].as_int()


def _is_identity_perm(node: ir.Node) -> bool:
    perm = _perm(node)
    return perm is not None and perm == sorted(perm)


def _is_same_expand(node: ir.Node) -> bool:
    shape, wanted = _dims(node.inputs[0]), constant_of(input_at(node, 1))
    if shape is None or wanted is None or len(wanted) > len(shape):
        return False
    return all(size in (1, dim) for size, dim in zip(wanted.tolist()[::-1], shape[::-1], strict=False))


def _is_same_reshape(node: ir.Node) -> bool:
    """Whether every size is kept: copied, or the known one; one may be left to be computed."""
    shape, wanted = _dims(node.inputs[0]), constant_of(input_at(node, 1))
    if shape is None or wanted is None or len(wanted) != len(shape) or node.attributes.get_int("allowzero", False):
        return False
    computed = [size for size, dim in zip(wanted.tolist(), shape, strict=True) if size not in (0, dim)]
    return not computed or computed == [-1]


def _is_whole_slice(node: ir.Node) -> bool:
    starts, ends, axes, steps = (constant_of(input_at(node, index)) for index in range(1, 5))
    shape = _dims(node.inputs[0])
    if starts is None or ends is None or shape is None or starts.any():
        return False
    if len(node.inputs) > 4 and node.inputs[4] is not None and (steps is None or (steps != 1).any()):
        return False
    if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
        return False
    cut = range(len(starts)) if axes is None else axes.tolist()
    sizes = [shape[axis] for axis in cut]
    return all(
        end >= (size if isinstance(size, int) else _TO_THE_END) for end, size in zip(ends.tolist(), sizes, strict=True)
    )


_NO_OPS: dict[str, Callable[[ir.Node], bool]] = {
    "Identity": lambda node: True,
    "Dropout": _is_dropout,
    "Pad": _is_empty_pad,
    "Cast": _is_same_cast,
    "Concat": lambda node: len(node.inputs) == 1,
    "Transpose": _is_identity_perm,
    "Expand": _is_same_expand,
    "Reshape": _is_same_reshape,
    "Slice": _is_whole_slice,
}


def _shorten(node: ir.Node, inserter: Inserter) -> bool:
    """Let the second of two operators do the work of both; whether that was possible."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "Transpose":
        return _shorten_transposes(node)
    if node.op_type == "Cast":
        return _shorten_casts(node)
    return node.op_type == "Reshape" and _shorten_reshapes(node, inserter)


def _shorten_transposes(node: ir.Node) -> bool:
    before = made_by(node.inputs[0], "Transpose")
    first, second = None if before is None else _perm(before), _perm(node)
    if before is None or first is None or second is None:
        return False
    node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    node.replace_input_with(0, before.inputs[0])
    return True


def _shorten_casts(node: ir.Node) -> bool:
    before = made_by(node.inputs[0], "Cast")
    source = None if before is None else before.inputs[0]
    if before is None or source is None or source.dtype is None:
        return False
    if not holds(ir.DataType(before.attributes["to"].as_int()), source.dtype):
        return False
    node.replace_input_with(0, source)
    return True


def _shorten_reshapes(node: ir.Node, inserter: Inserter) -> bool:
    before = next((found for op_type in _RESHAPES if (found := made_by(node.inputs[0], op_type)) is not None), None)
    wanted = constant_of(input_at(node, 1))
    if before is None or wanted is None or node.attributes.get_int("allowzero", False):
        return False
    sizes = _without_copies(wanted.tolist(), _dims(node.inputs[0]))
    if sizes is None:
        return False
    if sizes != wanted.tolist():
        name = node.inputs[1].name if node.inputs[1] is not None else None
        node.replace_input_with(1, inserter.initializer(f"{name or node.name}_sizes", np.asarray(sizes, np.int64)))
    node.replace_input_with(0, before.inputs[0])
    return True


def _without_copies(sizes: list[int], shape: list[int | str] | None) -> list[int] | None:
    """The sizes of a Reshape without zeros, which copy a size of its input; None where one is not known."""
    known = [dim if isinstance(dim, int) else 0 for dim in shape or []]
    filled = [size or (known[axis] if axis < len(known) else 0) for axis, size in enumerate(sizes)]
    if filled.count(0) == 1 and -1 not in filled:
        filled[filled.index(0)] = -1
    return None if 0 in filled else filled


def _perm(node: ir.Node) -> list[int] | None:
    given = node.attributes.get("perm")
    shape = _dims(node.inputs[0])
    if given is not None:
        return list(given.as_ints())
    return None if shape is None else list(range(len(shape)))[::-1]


def _dims(value: ir.Value | None) -> list[int | str] | None:
    """The sizes of a value, a dynamic one as its name, a nameless one as a word of its own; None where unknown."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else f"{dim.value}" for dim in value.shape]
