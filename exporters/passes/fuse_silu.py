"""Write a SiLU, and any logistic curve that is written out, with the Sigmoid operator.

    x / (1 + exp(−x))              →  Mul(x, Sigmoid(x))
    1 / (1 + exp(−x))              →  Sigmoid(x)                        also as Reciprocal
    a / (1 + exp(−x))              →  Mul(a, Sigmoid(x))
    x / (1 + exp(−1.702 · x))      →  Mul(x, Sigmoid(Mul(x, 1.702)))    the quick GELU of CLIP, with any factor

Compilers know Mul(x, Sigmoid(x)) as one function (SiLU, Swish; arXiv 1702.03118); so that form stays as it is, and so
does that of the quick GELU (arXiv 1606.08415, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Outcome
from exporters.passes.products import close, made_by, plus, product, scalar
from exporters.passes.put_in_place import drop_unused, put_in_place


@dataclass(frozen=True)
class FuseSilu:
    """Replace every division by 1 + exp(−x)."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them."""
        inserter, changed = Inserter(model.graph), 0
        for node in list(model.graph):
            found = _argument(node)
            if found is None or found[0].dtype is None:
                continue
            x = _scaled(inserter, node, *found)
            numerator = node.inputs[0] if node.op_type == "Div" else None
            if numerator is None or ((constant := scalar(numerator)) is not None and close(constant, 1.0, x)):
                put_in_place(inserter, node, "Sigmoid", [x])
            else:
                module = node.metadata_props.get(MODULE_KEY, "")
                dtype = found[0].dtype
                curve = inserter.node("Sigmoid", [x], dtype=dtype, module=module, before=node, shape=x.shape)
                put_in_place(inserter, node, "Mul", [numerator, curve])
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("fuse SiLU", changed)


def _scaled(inserter: Inserter, node: ir.Node, x: ir.Value, factor: float) -> ir.Value:
    """The product of x and a factor; x itself where that is 1."""
    assert x.dtype is not None
    if close(factor, 1.0, x):
        return x
    module = node.metadata_props.get(MODULE_KEY, "")
    constant = inserter.initializer(f"{module}.factor".removeprefix("."), np.asarray(factor, x.dtype.numpy()))
    return inserter.node("Mul", [x, constant], dtype=x.dtype, module=module, before=node, shape=x.shape)


def _argument(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The x and the factor k, which is positive, of a node that divides by 1 + exp(−k · x)."""
    if node.domain or node.op_type not in ("Div", "Reciprocal"):
        return None
    exponential = made_by(plus(node.inputs[-1], 1.0), "Exp")
    if exponential is None or exponential.inputs[0] is None:
        return None
    negated = product(exponential.inputs[0])
    return (negated.factors[0], -negated.constant) if negated.constant < 0 and len(negated.factors) == 1 else None
