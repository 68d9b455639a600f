"""Let constants that only mask attention be numbers of float16.

    Where(mask, scores, −3.4e38) ─► Softmax                →    Where(mask, scores, −30000) ─► Softmax
    scores + (1 − Cast(mask)) · −3.4e38 ─► Softmax         →    scores + (1 − Cast(mask)) · −30000 ─► Softmax
    Attention(q, k, v, Where(mask, 0, −inf))               →    Attention(q, k, v, Where(mask, 0, −30000))

e^−30000 is 0 in every type, so a key that is masked beside one that is not weighs 0 either way. Where all keys of a
query are masked, −inf made its row NaN, and −30000 makes it even. In a product the other factor has to be whole, by its
type or made of such: then it is 0, or leaves the constant as low as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.attention_mask import LOWEST
from exporters.linears import array_of
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.qdq_scales import constant_of, input_at

_BEYOND = -float(np.finfo(np.float16).max)
_SMALL = 1 << 10  # elements of a constant that is no mask, up to which it is read to tell why
_ANY = range(1 << 10)
# What a mask goes through, and as which of the inputs.
_PASSES_ON: Mapping[str, range] = {
    "Add": range(2), "Cast": range(1), "Concat": _ANY, "Expand": range(1), "Flatten": range(1), "Gather": range(1),
    "GatherND": range(1), "Identity": range(1), "Max": _ANY, "Reshape": range(1), "Slice": range(1),
    "Squeeze": range(1), "Tile": range(1), "Transpose": range(1), "Trilu": range(1), "Unsqueeze": range(1),
    "Where": range(1, 3),
}  # fmt: skip
_MASKS: Mapping[str, int] = {"Softmax": 0, "Attention": 3}
_OF_ONE = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_OF_TWO = frozenset({"Add", "Sub", "Mul"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class ClampMasks:
    """Raise what is below the range of float16 to LOWEST, in float32 constants that only mask attention."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Raise it; a small constant below that range that does anything else is left alone with the reason."""
        changed, left = 0, []
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if value.dtype != ir.DataType.FLOAT or tensor is None or not value.uses():
                continue
            why = _why_not(value, model.graph)
            if why and tensor.size > _SMALL:
                continue
            array = array_of(value).astype(np.float32, copy=False)
            if not (low := array < _BEYOND).any():
                continue
            if why:
                left.append(LeftAlone(value.name or "", why))
                continue
            value.const_value = ir.tensor(np.where(low, LOWEST, array), name=value.name)
            changed += 1
        return Outcome("clamp masks", changed, tuple(left))


def _why_not(value: ir.Value, graph: ir.Graph) -> str:
    """Why a value does more than mask attention; "" if it does not."""
    waiting, seen = [value], {value}
    while waiting:
        mask = waiting.pop()
        if mask.is_graph_output():
            return "it reaches an output of the graph"
        for node, index in mask.uses():
            if why := _why_no_mask(node, index, graph):
                return why
            if node.op_type not in _MASKS:
                waiting += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
    return ""


def _why_no_mask(node: ir.Node, index: int, graph: ir.Graph) -> str:
    """Why input `index` of `node` may be more than a mask, or what passes one on."""
    if node.graph is graph and not node.domain:
        if _MASKS.get(node.op_type) == index or index in _PASSES_ON.get(node.op_type, ()):
            return ""
        if node.op_type == "Mul":
            whole = _is_whole(input_at(node, 1 - index))
            return "" if whole else "it is multiplied by what may lie between 0 and 1"
    return f"a {node.op_type} reads it"


def _is_whole(value: ir.Value | None) -> bool:
    """Whether all elements are whole numbers, whatever the inputs of the graph are."""
    if value is None or value.dtype not in _FLOATS:
        return value is not None and value.dtype is not None
    if (constant := constant_of(value)) is not None:
        return bool((constant == np.floor(constant)).all())
    node = value.producer()
    if node is None or node.domain:
        return False
    if node.op_type in _OF_TWO:
        return _is_whole(node.inputs[0]) and _is_whole(node.inputs[1])
    return node.op_type in _OF_ONE and _is_whole(node.inputs[0])
