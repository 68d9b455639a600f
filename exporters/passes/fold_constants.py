"""Compute what depends on constants alone: shapes, masks, transposed scales.

    Where(Equal(mask, 0), 0, -100)   →   one constant

Tensors above a limit stay as they are, so that no weight is read: a mask of Swin's first stage has 64 · 49 · 49 values.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.passes.outcome import Outcome


@dataclass(frozen=True)
class FoldConstants:
    """Fold nodes whose inputs and outputs have at most `limit` elements."""

    limit: int = 1 << 20

    def __call__(self, model: ir.Model) -> Outcome:
        """Fold them."""
        from onnxscript import optimizer

        before = len(model.graph)
        optimizer.fold_constants(model, input_size_limit=self.limit, output_size_limit=self.limit)
        return Outcome("fold constants", before - len(model.graph))
