"""Write `RMSNormalization` in simple operators for parsers that do not have it (before opset 23).

    RMSNormalization(x, γ)   →   x ─► Cast f32 ─► x / √(mean(x²) + ε) ─► Cast ─► · γ

A normalization that is written out already takes the same form. The operator computes the mean square in float32, and
so does what stands for it: its nodes say in their metadata that they stay float32 when the graph gets a shorter type,
for x² leaves float16 beyond 255. The two casts are there for an x of a shorter type; for another one typing inserts
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.float_islands import F32, KEPT_KEY
from exporters.passes.inserter import Inserter
from exporters.passes.normalization import normalized
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused

WHY = "the mean square of a normalization"


@dataclass(frozen=True)
class LowerRmsNorm:
    """Replace every RMSNormalization, and what computes one already, so that it stays float32."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; what cannot be is left alone with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        for node in [node for node in model.graph if node.op_type == "RMSNormalization" and not node.domain]:
            x, scale = node.inputs[:2]
            if x is None or scale is None or x.dtype is None or x.shape is None:
                left.append(LeftAlone(label_of(node), "the type or shape of its input is unknown"))
                continue
            axis = node.attributes.get_int("axis", -1)
            axes = range(axis if axis < 0 else axis - len(x.shape), 0)
            normal = normalize(inserter, node, x, list(axes), node.attributes.get_float("epsilon", 1e-5))
            scaled = _Part(inserter, node).add("Mul", normal, scale, dtype=scale.dtype or x.dtype)
            scaled.shape = x.shape
            inserter.replace(node, scaled)
            changed += 1
        written = [node for node in model.graph if KEPT_KEY not in node.metadata_props]
        for node in written:
            found = normalized(node)
            if found is None or found.value.dtype is None or made_by(found.value, "Sub") is not None:
                continue
            inserter.replace(node, normalize(inserter, node, found.value, list(found.axes), found.epsilon))
            changed += 1
        if changed:
            drop_unused(model)
        return Outcome("lower RMS normalization", changed, tuple(left))


def normalize(inserter: Inserter, node: ir.Node, x: ir.Value, axes: list[int], epsilon: float) -> ir.Value:
    """Insert x / √(mean(x²) + ε) in float32 ahead of `node`, and return it in the type of x."""
    part = _Part(inserter, node)
    short = None if x.dtype == F32 else x.dtype
    wide = x if short is None else part.add("Cast", x, to=int(F32))
    squares = part.kept("Mul", wide, wide)
    over = inserter.initializer(f"axes_{'_'.join(str(-axis) for axis in axes)}_from_last", np.array(axes, np.int64))
    mean = part.kept("ReduceMean", squares, over, keepdims=1)
    shifted = part.kept("Add", mean, inserter.initializer(f"epsilon_{epsilon:g}", np.array(epsilon, np.float32)))
    normal = part.kept("Div", wide, part.kept("Sqrt", shifted))
    normal.shape = x.shape
    return normal if short is None else part.add("Cast", normal, dtype=short, to=int(short))


class _Part:
    """Inserts nodes ahead of one, for its module."""

    def __init__(self, inserter: Inserter, node: ir.Node) -> None:
        self.inserter = inserter
        self.node = node

    def add(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType = F32, **attributes: int) -> ir.Value:
        return self.inserter.node(
            op_type,
            inputs,
            dtype=dtype,
            module=self.node.metadata_props.get(MODULE_KEY, ""),
            attributes=attributes,
            before=self.node,
        )

    def kept(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        output = self.add(op_type, *inputs, dtype=F32, **attributes)
        producer = output.producer()
        assert producer is not None
        producer.metadata_props[KEPT_KEY] = WHY
        return output
