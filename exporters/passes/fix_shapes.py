"""Write shapes that are computed in the graph as constants, as far as the sizes are known.

    x [batch, 257, 384] ─► Shape ─► Gather, Unsqueeze, Concat ─► Reshape(x, ·)      →      Reshape(x, [−1, 257, 6, 64])

Exporters that traced a model write every size as a computation on Shape; later passes then cannot see that a Reshape
splits heads. A size of the batch stays open: −1 where it is the only one, else 0, which copies it. In an Expand a size
that the input has already is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.infer_shape import infer_shape
from exporters.known_sizes import KnownSizes, Size, remaining
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Outcome
from exporters.passes.put_in_place import drop_unused
from exporters.qdq_scales import constant_of


@dataclass(frozen=True)
class FixShapes:
    """Write them as constants, and infer shapes on the way."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Write them; counted are the inputs that became constants and the nodes that change no size."""
        graph, known, changed = model.graph, KnownSizes(), 0
        inserter, opset = Inserter(graph), model.opset_imports.get("") or 0
        for node in list(graph):
            infer_shape(node, opset)
            if node.op_type in ("Reshape", "Expand") and not node.domain:
                changed += _fix(node, known, inserter)
            known.learn(node)
            changed += _bypass(node, known, inserter)
        if changed:
            drop_unused(model)
        return Outcome("fix shapes", changed)


def _fix(node: ir.Node, known: KnownSizes, inserter: Inserter) -> bool:
    """Tell the output's shape of a Reshape or Expand, and give it its sizes as a constant."""
    dims, wanted, output = known.dims(node.inputs[0]), known.of(node.inputs[1]), node.outputs[0]
    means_zero = node.attributes.get_int("allowzero", False)
    if dims is None or wanted is None or (means_zero and 0 in wanted.tolist()):
        return False
    expands = node.op_type == "Expand"
    sizes = (_expanded if expands else _resolved)(dims, wanted.tolist())
    output.shape = ir.Shape(None if size is None or _is_unnamed(size) else size for size in sizes)
    fixed = _widening(dims, wanted.tolist()) if expands else _as_constant(dims, sizes)
    if fixed is None or constant_of(node.inputs[1]) is not None:
        return False
    if means_zero and 0 in fixed:
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    node.replace_input_with(1, inserter.initializer(f"{output.name}_sizes", np.asarray(fixed, np.int64)))
    return True


def _resolved(dims: Sequence[Size], wanted: Sequence[Size]) -> list[Size | None]:
    """The sizes after a Reshape: 0 copies a size, −1 is what remains; None where that is not known."""
    sizes = [dims[axis] if size == 0 and axis < len(dims) else size for axis, size in enumerate(wanted)]
    left = remaining(dims, [size for size in sizes if size != -1])
    return [left if size == -1 else size for size in sizes]


def _expanded(dims: Sequence[Size], wanted: Sequence[Size]) -> list[Size | None]:
    """The sizes after an Expand: of the two that stand above each other, the one that is not 1."""
    rank = max(len(dims), len(wanted))
    pairs = zip([1] * (rank - len(dims)) + list(dims), [1] * (rank - len(wanted)) + list(wanted), strict=True)
    return [b if a == 1 or a == b else a if b == 1 or isinstance(a, int) else None for a, b in pairs]


def _as_constant(dims: Sequence[Size], sizes: Sequence[Size | None]) -> list[int] | None:
    """The sizes of a Reshape as integers; None where two of them would have to be computed."""
    if _open(sizes) <= 1:
        return [size if isinstance(size, int) else -1 for size in sizes]
    copied = [0 if axis < len(dims) and size == dims[axis] else size for axis, size in enumerate(sizes)]
    return [size if isinstance(size, int) else -1 for size in copied] if _open(copied) <= 1 else None


def _widening(dims: Sequence[Size], wanted: Sequence[Size]) -> list[int] | None:
    """The sizes of an Expand as integers, 1 for one that the input has already; None where one has to be computed."""
    there = [None] * (len(wanted) - len(dims)) + list(dims[max(len(dims) - len(wanted), 0) :])
    fixed = [1 if size == dim else size for size, dim in zip(wanted, there, strict=True)]
    integers = [size for size in fixed if isinstance(size, int)]
    return integers if len(integers) == len(fixed) else None


def _open(sizes: Sequence[Size | None]) -> int:
    return sum(not isinstance(size, int) for size in sizes)


def _is_unnamed(size: Size) -> bool:
    return isinstance(size, str) and size.startswith("?")


def _bypass(node: ir.Node, known: KnownSizes, inserter: Inserter) -> bool:
    """Let readers of sizes read a constant, or an input of the node that has the same elements."""
    output = node.outputs[0] if node.outputs else None
    sizes = known.of(output)
    if output is None or sizes is None or output.is_graph_output() or not output.uses() or output.dtype is None:
        return False
    same = next((value for value in node.inputs if value is not None and _is_same(value, output, known)), None)
    if all(isinstance(size, int) for size in sizes.ravel()):
        same = inserter.initializer(f"{output.name}_known", sizes.astype(output.dtype.numpy()))
    if same is None:
        return False
    ir.convenience.replace_all_uses_with(output, same)
    return True


def _is_same(value: ir.Value, output: ir.Value, known: KnownSizes) -> bool:
    one, other = known.of(value), known.of(output)
    if one is None or other is None or value.dtype != output.dtype or one.shape != other.shape:
        return False
    return bool(np.all(one == other))
