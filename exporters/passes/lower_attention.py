"""Write the `Attention` operator as MatMul, Softmax, MatMul where a compiler cannot take it, or fuses it better so.

TensorRT's parser does not have it before 10.14. TensorRT-RTX 1.7 has it, and crashes where query and key are one value.

    Attention(q, k, v, mask)   →   MatMul(Softmax(MatMul(q · scale, kᵀ) + mask), v)

scale is 1 / sqrt(head size) unless given.
q, k and v are [batch, heads, tokens, head size]. The scale is multiplied into q and not into the product, the order in
which TensorRT fuses attention (Working with Transformers, fused attention).

Where a parser has the operator, this form is the better one still, if the number of tokens is known and no operand is
quantized: TensorRT fuses both, moves the heads of the operator's result in a kernel of its own, which this form does
not need in float16, and refuses the operator where it has no fused kernel (few tokens, small heads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.attention_mask import LOWEST
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.fuse_attention import LOWERED_KEY, SAME
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.same_value import same_value

_LACKING = "the target fuses it from MatMul and Softmax"

_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather"})


@dataclass(frozen=True)
class LowerAttention:
    """Replace every plain 4-D attention.

    Attributes:
        crashing: whether only those are replaced whose query and key are one value.
        may_stay: whether only those are replaced that are fused in this form for certain.
    """

    crashing: bool = False
    may_stay: bool = False

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; caches, causality, soft caps and shared key heads are left alone with the reason."""
        inserter = Inserter(model.graph)
        changes: list[Change] = []
        left: list[LeftAlone] = []
        for node in [node for node in model.graph if node.op_type == "Attention" and not node.domain]:
            if self.crashing and not same_value(node.inputs[0], node.inputs[1]):
                continue
            if why := _why_not(node) or (_why_it_stays(node) if self.may_stay else ""):
                left.append(LeftAlone(node.name or "", f"{why}, and {SAME}" if self.crashing else why))
                continue
            changes.append(Change(label_of(node), f"written out: {SAME if self.crashing else _LACKING}"))
            _Lowering(node, inserter).run()
        if changes:
            drop_unused_initializers(model.graph)
        return Outcome("lower attention", len(changes), tuple(left), tuple(changes))


def _why_not(node: ir.Node) -> str:
    if any(value is not None for value in node.inputs[4:]):
        return "it has a key/value cache"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None and mask.dtype not in (node.inputs[0].dtype, ir.DataType.BOOL):  # type: ignore[union-attr]
        return "its mask has another type than its query"
    softcap = node.attributes.get("softcap")
    if node.attributes.get_int("is_causal", 0) or (softcap is not None and softcap.as_float()):
        return "it is causal or has a soft cap"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its second output is read"
    shapes = [value.shape for value in node.inputs[:3] if value is not None]
    if any(shape is None or len(shape) != 4 for shape in shapes) or not isinstance(shapes[0][3], int):  # type: ignore[index]
        return "its inputs are not 4-D with a known head size"
    if shapes[0][1] != shapes[1][1]:  # type: ignore[index]
        return "its query heads share key heads"
    return ""


def _why_it_stays(node: ir.Node) -> str:
    lengths = [value.shape[2] for value in node.inputs[:2] if value is not None and value.shape is not None]
    if not all(isinstance(length, int) for length in lengths):
        return "its number of tokens varies"
    quantized = any(_is_quantized(value) for value in node.inputs[:3])
    return "its operands are quantized and its softmax is not: no kernel computes that" if quantized else ""


def _is_quantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


class _Lowering:
    """The replacement of one Attention node."""

    def __init__(self, node: ir.Node, inserter: Inserter) -> None:
        self.node = node
        self.inserter = inserter
        self.module = node.metadata_props.get(MODULE_KEY, "")
        q, k, v = node.inputs[:3]
        assert q is not None
        assert k is not None
        assert v is not None
        assert q.dtype is not None
        assert q.shape is not None
        self.qkv = (q, k, v)
        self.dtype, self.shape = q.dtype, q.shape

    def run(self) -> None:
        """Replace the node."""
        old = self.node.outputs[0]
        new = self.attend(self.qkv)
        new.shape = old.shape
        self.inserter.replace(self.node, new)

    def attend(self, qkv: Sequence[ir.Value]) -> ir.Value:
        q, k, v = qkv
        head_size = self.shape[3]
        assert isinstance(head_size, int)
        given = self.node.attributes.get("scale")
        factor = head_size**-0.5 if given is None else given.as_float()
        scale = self.inserter.initializer(f"{self.module}.scale", np.asarray(factor, self.dtype.numpy()))
        scaled, transposed = self.add("Mul", q, scale), self.add("Transpose", k, perm=[0, 1, 3, 2])
        scaled.shape = q.shape
        scores = self.masked(self.add("MatMul", scaled, transposed))
        weights = self.add("Softmax", scores, axis=-1)
        softmax = weights.producer()
        assert softmax is not None
        softmax.metadata_props[LOWERED_KEY] = "lowered"
        return self.add("MatMul", weights, v)

    def masked(self, scores: ir.Value) -> ir.Value:
        """The scores with the mask added, a boolean one as 0 and LOWEST."""
        mask = self.node.inputs[3] if len(self.node.inputs) > 3 else None
        if mask is None:
            return scores
        if mask.dtype == ir.DataType.BOOL:
            zero = self.inserter.initializer(f"{self.module}.zero", np.asarray(0, self.dtype.numpy()))
            lowest = self.inserter.initializer(f"{self.module}.lowest", np.asarray(LOWEST, self.dtype.numpy()))
            mask = self.add("Where", mask, zero, lowest)
        return self.add("Add", scores, mask)

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        return self.inserter.node(
            op_type, inputs, dtype=self.dtype, module=self.module, attributes=attributes, before=self.node
        )
