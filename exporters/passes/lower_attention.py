"""Write the `Attention` operator as MatMul, Softmax, MatMul for parsers that do not have it (TensorRT before 10.14).

    Attention(q, k, v, mask)   →   MatMul(Softmax(MatMul(q · scale, kᵀ) + mask), v)

scale is 1 / sqrt(head size) unless given.
q, k and v are [batch, heads, tokens, head size]. The scale is multiplied into q and not into the product, the order in
which TensorRT fuses attention (Working with Transformers, fused attention).

Where the three are the slices of one packed tensor [3, batch, heads, tokens, head size], as a fused qkv layer leaves
them, they are taken apart as

    Reshape [3·batch, heads, tokens, head size] → Split in 3 → q, k, v

because the compiler pulls a Slice along the packed axis back through the GEMM: it then cuts the INT8 weight in three,
dequantizes it and runs the GEMM in FP16 (compiled with TensorRT-RTX 1.7 for sm86, four blocks: 4 of 18 GEMMs lost, 59
kernels instead of 47). It cannot pull back a Split across the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.attention_mask import LOWEST
from exporters.linears import array_of
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import LeftAlone, Outcome


@dataclass(frozen=True)
class LowerAttention:
    """Replace every plain 4-D attention."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; caches, causality, soft caps and shared key heads are left alone with the reason."""
        inserter = Inserter(model.graph)
        changed, left = 0, []
        for node in [node for node in model.graph if node.op_type == "Attention" and not node.domain]:
            if why := _why_not(node):
                left.append(LeftAlone(node.name or "", why))
                continue
            _Lowering(node, inserter).run()
            changed += 1
        if changed:
            drop_unused_initializers(model.graph)
        return Outcome("lower attention", changed, tuple(left))


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
        packed = _packed(self.qkv)
        new = self.attend(self.qkv if packed is None else self.split(packed))
        new.shape = old.shape
        dead = [node for value in self.qkv if packed for node in _slice_and_squeeze(value)]
        self.inserter.replace(self.node, new)
        for node in dead:
            self.inserter.graph.remove(node, safe=True)

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
        return self.add("MatMul", self.add("Softmax", scores, axis=-1), v)

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

    def split(self, packed: ir.Value) -> Sequence[ir.Value]:
        flat = self.reshape(packed, [-1, *self.shape[1:]], "flat")
        parts = self.inserter.nodes(
            "Split",
            [flat],
            dtype=self.dtype,
            module=self.module,
            attributes={"axis": 0, "num_outputs": 3},
            before=self.node,
            outputs=3,
        )
        for part in parts:
            part.shape = self.shape
        return parts

    def reshape(self, value: ir.Value, shape: Sequence[int | ir.SymbolicDim], name: str) -> ir.Value:
        dims = np.asarray([dim if isinstance(dim, int) else -1 for dim in shape], np.int64)
        return self.add("Reshape", value, self.inserter.initializer(f"{self.module}.{name}", dims))

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        return self.inserter.node(
            op_type, inputs, dtype=self.dtype, module=self.module, attributes=attributes, before=self.node
        )


def _packed(qkv: Sequence[ir.Value]) -> ir.Value | None:
    """The tensor [3, batch, heads, tokens, head size] whose slices along axis 0 are q, k and v, or None."""
    sources = [_slice_source(value, index) for index, value in enumerate(qkv)]
    packed = sources[0]
    if packed is None or any(source is not packed for source in sources):
        return None
    shape = packed.shape
    if shape is None or len(shape) != 5 or shape[0] != 3 or not all(isinstance(dim, int) for dim in shape[2:]):
        return None
    return packed


def _slice_source(value: ir.Value, index: int) -> ir.Value | None:
    """What `value` is the slice [index] of along axis 0, through Slice and Squeeze; None if it is not that."""
    nodes = _slice_and_squeeze(value)
    if len(nodes) != 2:
        return None
    squeeze, cut = nodes
    start, end, axis = (_integer(v) for v in cut.inputs[1:4])
    if (start, end, axis, _integer(squeeze.inputs[1])) != (index, index + 1, 0, 0):
        return None
    return cut.inputs[0]


def _slice_and_squeeze(value: ir.Value) -> list[ir.Node]:
    squeeze = value.producer()
    if squeeze is None or squeeze.op_type != "Squeeze" or squeeze.inputs[0] is None:
        return []
    cut = squeeze.inputs[0].producer()
    if cut is None or cut.op_type != "Slice" or len(cut.inputs) != 4:
        return []
    return [squeeze, cut] if len(value.uses()) == 1 and len(squeeze.inputs[0].uses()) == 1 else []


def _integer(value: ir.Value | None) -> int | None:
    if value is None or value.const_value is None or array_of(value).size != 1:
        return None
    return int(array_of(value).item())
