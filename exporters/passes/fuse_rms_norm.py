"""Fold an RMS normalization that is written out into one operator.

    x / √(mean(x²) + ε) · γ   →   RMSNormalization(x, γ, epsilon=ε)          arXiv 1910.07467

The mean is over the last axes; the division may be written as Div, or as Mul with Reciprocal or a power of −½.
TensorRT-RTX 1.7 compiles both forms to the same number of kernels (FP16 before a GEMM, a residual and a quantizer: one
kernel each), so what is won is that the operator computes the mean in float32: x² leaves float16 beyond 255.

The form may stand between casts to float32 and back, as Llama's does: the operator computes in float32 itself. Gemma
multiplies by 1 + γ between the casts, too: they go if no number of that constant is rounded by it, else they stay.

`RMSNormalization` exists from opset 23 on; for an older graph or target the written form stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import array_of
from exporters.passes.inserter import Inserter
from exporters.passes.normalization import Normalized, normalized, ones, sizes, uncast, weighted
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused, put_in_place

OPSET = 23
_TOO_OLD = f"the operator exists from opset {OPSET} on"


@dataclass(frozen=True)
class FuseRmsNorm:
    """Replace every RMS normalization that is written out, for a parser that takes `opset`."""

    opset: int

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; what cannot be is left alone with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        opset = min(self.opset, model.opset_imports.get("") or 0)
        for node in list(model.graph):
            found = normalized(node)
            if found is None or made_by(found.value, "Sub") is not None:
                continue
            shape = sizes(found.value, found.axes) if opset >= OPSET else _TOO_OLD
            if isinstance(shape, str):
                left.append(LeftAlone(node.name or "", shape))
                continue
            _fuse(inserter, node, found, shape)
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("fuse RMS normalization", changed, tuple(left))


def _narrowed(inserter: Inserter, scale: ir.Value, like: ir.Value) -> ir.Value | None:
    """The constant in the type of `like`; None where that would round it."""
    assert like.dtype is not None
    wide = array_of(scale)
    narrow = wide.astype(like.dtype.numpy())
    if not np.array_equal(narrow.astype(wide.dtype), wide):
        return None
    return inserter.initializer(f"{scale.name}_{like.dtype.name.lower()}", narrow)


def _fuse(inserter: Inserter, node: ir.Node, found: Normalized, shape: tuple[int, ...]) -> None:
    node, x = uncast(node, found.value)
    last, scale = weighted(node, "Mul", shape)
    cast, short = uncast(last, x)
    narrow = None if scale is None or cast is last else _narrowed(inserter, scale, short)
    if narrow is not None:
        last, x, scale = cast, short, narrow
    assert x.dtype is not None
    inputs = [x, scale or ones(inserter, x.dtype, shape)]
    put_in_place(inserter, last, "RMSNormalization", inputs, {"axis": -len(shape), "epsilon": found.epsilon})
