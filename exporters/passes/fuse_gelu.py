"""Fold a GELU that is written out with tanh into one operator.

    0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))  →  Gelu(x, approximate="tanh")

Transformers' `NewGELUActivation` (GPT-2; arXiv 1606.08415, section 2) writes it so. `Gelu` exists from opset 20 on; a
graph for an older one is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from exporters.passes.outcome import LeftAlone, Outcome

OPSET = 20


@dataclass(frozen=True)
class FuseGelu:
    """Replace every GELU that is written out."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them."""
        from onnxscript.rewriter import pattern

        if (model.opset_imports.get("") or 0) < OPSET:
            return Outcome("fuse GELU", 0, (LeftAlone("GELU", f"the operator exists from opset {OPSET} on"),))
        rule = pattern.RewriteRule(_written_out, _single)
        return Outcome("fuse GELU", pattern.RewriteRuleSet([rule], commute=True).apply_to_model(model))


def _written_out(op: Any, x: Any) -> Any:
    inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715)), 0.7978845608)
    return op.Mul(op.Mul(x, 0.5), op.Add(op.Tanh(inner), 1.0))


def _single(op: Any, x: Any) -> Any:
    return op.Gelu(x, approximate="tanh")
