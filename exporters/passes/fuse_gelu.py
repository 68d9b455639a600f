"""Fold a GELU that is written out into one operator.

    0.5 · x · (1 + erf(x / √2))                            →  Gelu(x)
    0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))     →  Gelu(x, approximate="tanh")

Both are in arXiv 1606.08415, section 2; the second is Transformers' `NewGELUActivation` (GPT-2). The factors may stand
in any order, and the argument of tanh may be written as √(2/π) · x · (1 + 0.044715 · x²).

`Gelu` exists from opset 20 on; a graph for an older one is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from exporters.passes.inserter import Inserter
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.products import close, made_by, plus, product
from exporters.passes.put_in_place import drop_unused, put_in_place

OPSET = 20
_CUBIC = 0.044715


@dataclass(frozen=True)
class FuseGelu:
    """Replace every GELU that is written out."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them."""
        found = [(node, *gelu) for node in model.graph if (gelu := _gelu(node)) is not None]
        if found and (model.opset_imports.get("") or 0) < OPSET:
            why = f"the operator exists from opset {OPSET} on"
            return Outcome("fuse GELU", 0, tuple(LeftAlone(node.name or "", why) for node, _, _ in found))
        inserter = Inserter(model.graph)
        for node, x, approximate in found:
            put_in_place(inserter, node, "Gelu", [x], {"approximate": approximate})
        if found:
            drop_unused(model)
        return Outcome("fuse GELU", len(found))


def _gelu(node: ir.Node) -> tuple[ir.Value, str] | None:
    """The x and the kind of approximation, where the node is the last one of a GELU of x."""
    if node.op_type not in ("Mul", "Div") or node.domain:
        return None
    whole = product(node.outputs[0])
    if len(whole.factors) != 2:
        return None
    for x, shifted in (whole.factors, whole.factors[::-1]):
        curve = plus(shifted, 1.0)
        if curve is None or not close(whole.constant, 0.5, x):
            continue
        if (erf := made_by(curve, "Erf")) is not None and _is_scaled(erf.inputs[0], x):
            return x, "none"
        if (tanh := made_by(curve, "Tanh")) is not None and _is_cubic(tanh.inputs[0], x):
            return x, "tanh"
    return None


def _is_scaled(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether it is x / √2."""
    if value is None:
        return False
    found = product(value)
    return found.factors == (x,) and close(found.constant, math.sqrt(0.5), x)


def _is_cubic(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether it is √(2/π) · (x + 0.044715 · x³), or √(2/π) · x · (1 + 0.044715 · x²)."""
    if value is None:
        return False
    found = product(value)
    if not close(found.constant, math.sqrt(2 / math.pi), x):
        return False
    if len(found.factors) == 1:
        return any(first is x and _is_power(other, x, 3) for first, other in _addends(found.factors[0]))
    rest = found.without(x)
    return rest is not None and len(rest) == 1 and _is_power(plus(rest[0], 1.0), x, 2)


def _addends(value: ir.Value) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    if (node := made_by(value, "Add")) is not None:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]


def _is_power(value: ir.Value | None, x: ir.Value, exponent: int) -> bool:
    """Whether it is 0.044715 · x to the power of `exponent`."""
    if value is None:
        return False
    found = product(value)
    return found.factors == (x,) * exponent and close(found.constant, _CUBIC, x)
