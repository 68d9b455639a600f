"""Write `RotaryEmbedding` in simple operators for parsers that do not have it (before opset 23).

    RotaryEmbedding(x, cos, sin)   →   Concat(x₁ · cos − x₂ · sin, x₁ · sin + x₂ · cos)          arXiv 2104.09864

x is [batch, heads, tokens, head size]. x₁ and x₂ are the halves of a head, or its even and odd elements where it is
interleaved. cos and sin are [batch, tokens, head size / 2], or [positions, head size / 2] with the positions as a
further input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.qdq_scales import input_at


@dataclass(frozen=True)
class LowerRotary:
    """Replace every RotaryEmbedding of a 4-D tensor that turns whole heads."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; others are left alone with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        for node in [node for node in model.graph if node.op_type == "RotaryEmbedding" and not node.domain]:
            if why := _why_not(node):
                left.append(LeftAlone(label_of(node), why))
                continue
            _Lowering(inserter, node).run()
            changed += 1
        return Outcome("lower rotary embedding", changed, tuple(left))


def _why_not(node: ir.Node) -> str:
    x = node.inputs[0]
    if x is None or x.dtype is None or x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
        return "its input is not 4-D with a known head size"
    if node.attributes.get_int("rotary_embedding_dim", 0) not in (0, x.shape[3]):
        return "it turns a part of each head only"
    return ""


class _Lowering:
    """The replacement of one node."""

    def __init__(self, inserter: Inserter, node: ir.Node) -> None:
        x = node.inputs[0]
        assert x is not None
        assert x.dtype is not None
        assert x.shape is not None
        assert isinstance(x.shape[3], int)
        self.inserter = inserter
        self.node = node
        self.x, self.dtype, self.size = x, x.dtype, x.shape[3]
        self.interleaved = bool(node.attributes.get_int("interleaved", 0))

    def run(self) -> None:
        """Replace the node."""
        half = self.size // 2
        parts = self.split(self.reshape(self.x, [0, 0, 0, half, 2]) if self.interleaved else self.x)
        cos, sin = (self.angles(index) for index in (1, 2))
        left = self.add("Sub", self.add("Mul", parts[0], cos), self.add("Mul", parts[1], sin))
        right = self.add("Add", self.add("Mul", parts[0], sin), self.add("Mul", parts[1], cos))
        turned = self.add("Concat", left, right, axis=-1)
        if self.interleaved:
            turned = self.reshape(turned, [0, 0, 0, self.size])
        turned.shape = self.x.shape
        self.inserter.replace(self.node, turned)

    def split(self, value: ir.Value) -> Sequence[ir.Value]:
        sizes = [1, 1] if self.interleaved else [self.size // 2] * 2
        return self.inserter.nodes(
            "Split",
            [value, self.constant("halves", sizes)],
            dtype=self.dtype,
            module=self.module,
            attributes={"axis": -1},
            before=self.node,
            outputs=2,
        )

    def angles(self, index: int) -> ir.Value:
        """The cosines or sines as they broadcast: [batch, 1, tokens, head size / 2], with a last 1 if interleaved."""
        values, positions = self.node.inputs[index], input_at(self.node, 3)
        assert values is not None
        if positions is not None:
            values = self.add("Gather", values, positions, axis=0)
        return self.add("Unsqueeze", values, self.constant("axes", [1, -1] if self.interleaved else [1]))

    def reshape(self, value: ir.Value, shape: list[int]) -> ir.Value:
        return self.add("Reshape", value, self.constant("shape", shape))

    def constant(self, name: str, values: list[int]) -> ir.Value:
        full = f"rotary_{name}_{'_'.join(map(str, values))}"
        return self.inserter.initializer(full, np.array(values, np.int64))

    @property
    def module(self) -> str:
        return self.node.metadata_props.get(MODULE_KEY, "")

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self.inserter.node(
            op_type, inputs, dtype=self.dtype, module=self.module, attributes=attributes, before=self.node
        )
