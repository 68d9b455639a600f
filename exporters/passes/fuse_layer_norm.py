"""Fold a layer normalization that is written out into one operator.

    d = x − mean(x);   d / √(mean(d²) + ε) · γ + β   →   LayerNormalization(x, γ, β, epsilon=ε)

The mean is over the last axes (arXiv 1607.06450). The square may be written as d · d, the division as Div, or as Mul
with Reciprocal or a power of −½; ε is kept as it is. Without γ, a constant of ones stands for it; a γ or β that is
no constant of the shape of the last axes stays outside.

The scale may be multiplied into the root first (`exporters.passes.folded_norm`), and the whole may stand between casts
to float32 and back: the operator computes in float32 itself.

`LayerNormalization` exists from opset 17 on; a graph for an older one is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.linears import array_shape
from exporters.passes.folded_norm import Folded, folded
from exporters.passes.inserter import Inserter
from exporters.passes.normalization import Normalized, mean_of, normalized, ones, sizes, uncast, weighted
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused, put_in_place

OPSET = 17
_TOO_OLD = f"the operator exists from opset {OPSET} on"


@dataclass(frozen=True)
class FuseLayerNorm:
    """Replace every layer normalization that is written out."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; what cannot be is left alone with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        for node in list(model.graph):
            if (tensorflow := folded(node)) is not None:
                changed += _fuse_folded(inserter, node, tensorflow, model.opset_imports.get("") or 0)
                continue
            found = normalized(node)
            x = None if found is None else _centered(found)
            if found is None or x is None:
                continue
            shape = sizes(x, found.axes) if (model.opset_imports.get("") or 0) >= OPSET else _TOO_OLD
            if isinstance(shape, str):
                left.append(LeftAlone(node.name or "", shape))
                continue
            _fuse(inserter, node, x, shape, found.epsilon)
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("fuse layer normalization", changed, tuple(left))


def _centered(found: Normalized) -> ir.Value | None:
    """The x of d = x − mean(x) over the same axes as the mean of d²."""
    node = made_by(found.value, "Sub")
    if node is None or node.inputs[0] is None:
        return None
    mean = mean_of(node.inputs[1])
    return node.inputs[0] if mean is not None and mean.value is node.inputs[0] and mean.axes == found.axes else None


def _fuse(inserter: Inserter, node: ir.Node, x: ir.Value, shape: tuple[int, ...], epsilon: float) -> None:
    node, x = uncast(node, x)
    assert x.dtype is not None
    last, scale = weighted(node, "Mul", shape)
    last, bias = weighted(last, "Add", shape)
    inputs = [x, scale or ones(inserter, x.dtype, shape)] + ([] if bias is None else [bias])
    put_in_place(inserter, last, "LayerNormalization", inputs, {"axis": -len(shape), "epsilon": epsilon})


def _fuse_folded(inserter: Inserter, node: ir.Node, found: Folded, opset: int) -> bool:
    """Put the operator in place of one whose scale and bias, if any, are constants; return whether it could be."""
    x, shape = found.value, sizes(found.value, found.axes)
    constants = [value for value in (found.scale, found.bias) if value is not None]
    if opset < OPSET or isinstance(shape, str) or any(_shape_of(value) != shape for value in constants):
        return False
    assert x.dtype is not None
    inputs = [x, found.scale or ones(inserter, x.dtype, shape)] + ([] if found.bias is None else [found.bias])
    put_in_place(inserter, node, "LayerNormalization", inputs, {"axis": -len(shape), "epsilon": found.epsilon})
    return True


def _shape_of(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a constant; None for anything else."""
    constant = value.is_initializer() and not value.is_graph_input() and value.const_value is not None
    return array_shape(value) if constant else None
