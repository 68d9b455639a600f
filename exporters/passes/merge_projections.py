"""Make one GEMM of the projections to q, k and v that read the same tensor.

    x·Wq + bq → [B, N, H, d] → q            x·[Wq Wk Wv] + [bq bk bv] → [B, N, 3, H, d] → [3, B, H, N, d] ─┬► q
    x·Wk + bk → [B, N, H, d] → k     →                                                                     ├► k
    x·Wv + bv → [B, N, H, d] → v                                                                           └► v

One GEMM instead of three, one transpose instead of three, and the form that a fused qkv layer of timm has. Each output
channel keeps its own column and its own scale, so no number changes: a scale of a whole weight is repeated for its
channels. The weights are put together when they are read, which is when the graph is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.linears import array_shape
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.joined_weights import joined_bias, joined_name, joined_weight, made_for_one
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.qdq_scales import constant_of, input_at

_TO_HEADS = (0, 2, 1, 3)


@dataclass(frozen=True)
class MergeProjections:
    """Merge two or three projections of each Attention node."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Merge them; an attention whose projections differ is reported with the reason."""
        inserter = Inserter(model.graph)
        changed, left = 0, []
        for node in [node for node in model.graph if node.op_type == "Attention" and not node.domain]:
            found = [_projection(value) for value in node.inputs[:3] if value is not None]
            for group in _groups([projection for projection in found if projection is not None]):
                if why := _why_not(group):
                    left.append(LeftAlone(label_of(node), why))
                else:
                    _merge(group, inserter)
                    changed += 1
        if changed:
            drop_unused_initializers(model.graph)
        return Outcome("merge projections", changed, tuple(left))


@dataclass(frozen=True)
class _Projection:
    """One of q, k and v, from x to heads.

    Attributes:
        nodes: MatMul, Add unless there is no bias, Reshape, Transpose.
        bias: [H · d], if there is one.
        dq: what dequantizes the weight, if it is quantized.
    """

    nodes: tuple[ir.Node, ...]
    bias: ir.Value | None
    dq: ir.Node | None

    @property
    def matmul(self) -> ir.Node:
        return self.nodes[0]

    @property
    def transpose(self) -> ir.Node:
        return self.nodes[-1]

    @property
    def heads(self) -> tuple[int | ir.SymbolicDim, ...]:
        """[N, H, d]."""
        shape = self.nodes[-2].outputs[0].shape
        return () if shape is None else tuple(shape)[1:]

    @property
    def size(self) -> tuple[int, int]:
        """[K, n] of the weight."""
        k, n = array_shape(self.weight)
        return k, n

    @property
    def weight(self) -> ir.Value:
        """The constant, [K, H · d]."""
        value = self.matmul.inputs[1] if self.dq is None else self.dq.inputs[0]
        assert value is not None
        return value

    @property
    def source(self) -> tuple[object, ...]:
        """What tells whether two project the same: the tensor, or the quantized one and how it is dequantized."""
        x = self.matmul.inputs[0]
        dq = _dq_of(x)
        parameters = [] if dq is None else [constant_of(input_at(dq, index)) for index in (1, 2)]
        if dq is None or parameters[0] is None:
            return (x,)
        return (dq.inputs[0], *(None if array is None else array.tobytes() for array in parameters), _along(dq))


def _projection(value: ir.Value) -> _Projection | None:
    """Trace an input of Attention back to its GEMM."""
    transpose = made_for_one(value, "Transpose")
    if transpose is None and (folded := made_for_one(value, "Reshape")) is not None:  # of windows into heads
        transpose = made_for_one(folded.inputs[0], "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != _TO_HEADS:
        return None
    reshape = made_for_one(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    matmul, add, bias = _matmul_and_bias(reshape)
    if matmul is None or matmul.inputs[1] is None:
        return None
    nodes = (matmul, reshape, transpose) if add is None else (matmul, add, reshape, transpose)
    projection = _Projection(nodes, bias, made_for_one(matmul.inputs[1], "DequantizeLinear"))
    return projection if projection.weight.is_initializer() and len(array_shape(projection.weight)) == 2 else None


def _matmul_and_bias(reshape: ir.Node) -> tuple[ir.Node | None, ir.Node | None, ir.Value | None]:
    add = made_for_one(reshape.inputs[0], "Add")
    if add is None:
        return made_for_one(reshape.inputs[0], "MatMul"), None, None
    for x, bias in ((add.inputs[0], add.inputs[1]), (add.inputs[1], add.inputs[0])):
        matmul = made_for_one(x, "MatMul")
        if matmul is not None and bias is not None and bias.is_initializer() and len(array_shape(bias)) == 1:
            return matmul, add, bias
    return None, None, None


def _groups(found: Sequence[_Projection]) -> Iterator[list[_Projection]]:
    """Those of them that read one tensor, two at least."""
    by_source: dict[tuple[object, ...], list[_Projection]] = {}
    for projection in found:
        by_source.setdefault(projection.source, []).append(projection)
    yield from (group for group in by_source.values() if len(group) > 1)


def _why_not(group: Sequence[_Projection]) -> str:
    if len({str(projection.heads) for projection in group}) > 1:
        return "its projections have different numbers of heads"
    if not all(_splits_into_heads(projection) for projection in group):
        return "its projections are reshaped to more than heads"
    if len({_kind(projection) for projection in group}) > 1:
        return "its projections are quantized in different ways"
    dqs = [projection.dq for projection in group if projection.dq is not None]
    if any(constant_of(value) is None for dq in dqs for value in dq.inputs[1:]):
        return "the scales of its weights are no constants"
    if any(_has_blocks(dq) and _along(dq) == 1 for dq in dqs):
        return "its weights have blocks along N"
    return "its weights have scales along K" if any(_along_k(dq) for dq in dqs) else ""


def _splits_into_heads(projection: _Projection) -> bool:
    """Whether the Reshape makes [B, N, H, d] of [B, N, H · d], or of the same rows in another shape if N is known."""
    if len(projection.heads) != len(_TO_HEADS) - 1:
        return False
    tokens, heads, size = projection.heads
    if not isinstance(heads, int) or not isinstance(size, int) or heads * size != projection.size[1]:
        return False
    reshape = projection.nodes[-2]
    x, after = projection.matmul.inputs[0], reshape.outputs[0].shape
    before = None if x is None else x.shape
    if isinstance(tokens, int) or before is None or after is None:
        return isinstance(tokens, int)
    target = constant_of(reshape.inputs[1])
    kept = target is not None and target[0] == 0 and not reshape.attributes.get_int("allowzero", 0)
    named = tokens.value is not None and list(before)[:2] == list(after)[:2]
    return len(before) == 3 and (kept or named)


def _kind(projection: _Projection) -> tuple[object, ...]:
    dq = projection.dq
    if dq is None:
        return (projection.size[0], projection.weight.dtype)
    types = [None if value is None else value.dtype for value in (*dq.inputs, *dq.outputs)]
    return (projection.size[0], *types, dq.attributes.get_int("block_size", 0))


def _along(dq: ir.Node) -> int:
    return dq.attributes.get_int("axis", 1) % 2


def _has_blocks(dq: ir.Node) -> bool:
    return dq.attributes.get_int("block_size", 0) > 0


def _along_k(dq: ir.Node) -> bool:
    scale = constant_of(dq.inputs[1])
    return scale is not None and scale.size > 1 and not _has_blocks(dq) and _along(dq) == 0


def _merge(group: Sequence[_Projection], inserter: Inserter) -> None:
    graph = inserter.graph
    order = {node: index for index, node in enumerate(graph)}
    first = min((projection.matmul for projection in group), key=order.__getitem__)
    x = first.inputs[0]
    assert x is not None
    module = group[0].transpose.metadata_props.get(MODULE_KEY, "")
    names = [projection.matmul.metadata_props.get(MODULE_KEY, "") for projection in group]
    merging = _Merging(inserter, first, module, joined_name(names))
    merged = merging.add("MatMul", x, merging.weight(group), shape=_merged_shape(x, group))
    if any(projection.bias is not None for projection in group):
        merged = merging.add("Add", merged, merging.bias(group), shape=merged.shape)
    parts = list(merging.heads(merged, group))
    for projection, part in zip(group, parts, strict=True):
        part.shape = projection.transpose.outputs[0].shape
        dqs = [node for value in projection.matmul.inputs if (node := _dq_of(value)) is not None]
        inserter.replace(projection.transpose, part)
        for node in (*reversed(projection.nodes[:-1]), *dqs):
            if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                graph.remove(node, safe=True)


def _merged_shape(x: ir.Value, group: Sequence[_Projection]) -> ir.Shape | None:
    width = sum(projection.size[1] for projection in group)
    return None if x.shape is None else ir.Shape([*list(x.shape)[:-1], width])


def _dq_of(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


@dataclass(frozen=True)
class _Merging:
    """New nodes ahead of `before`: those of the GEMM belong to `linear`, the others to `module`."""

    inserter: Inserter
    before: ir.Node
    module: str
    linear: str

    def weight(self, group: Sequence[_Projection]) -> ir.Value:
        weights = [projection.weight for projection in group]
        weight = joined_weight(self.inserter, f"{self.linear}.weight", weights)
        dq = group[0].dq
        if dq is None:
            return weight
        inputs = [weight]
        for index, name in list(enumerate(("weight", "weight_scale", "weight_zero_point")))[1 : len(dq.inputs)]:
            inputs.append(self.together(name, [_per_channel(projection, index) for projection in group]))
        block = dq.attributes.get_int("block_size", 0)
        return self.inserter.node(
            "DequantizeLinear",
            inputs,
            dtype=dq.outputs[0].dtype or ir.DataType.FLOAT,
            module=self.linear,
            attributes={"axis": _along(dq), "block_size": block} if block else {"axis": 1},
            before=self.before,
            shape=weight.shape,
        )

    def bias(self, group: Sequence[_Projection]) -> ir.Value:
        joined = joined_bias([projection.bias for projection in group], [projection.size[1] for projection in group])
        return self.inserter.initializer(f"{self.linear}.bias", joined)

    def heads(self, merged: ir.Value, group: Sequence[_Projection]) -> Iterator[ir.Value]:
        """Take [B, N, count · H · d] apart into `count` of [B, H, N, d]."""
        tokens, *size = group[0].heads
        count, fixed = len(group), isinstance(tokens, int)
        dims = [-1 if fixed else 0, tokens if fixed else 0, count, *size]
        packed = self.add("Reshape", merged, self.integers("heads", dims), module=self.module)
        packed = self.add("Transpose", packed, perm=[2, 0, 3, 1, 4], module=self.module)
        packed.shape = ir.Shape([count, *(group[0].transpose.outputs[0].shape or ())])
        axis = self.integers("", [0])
        for index in range(count):
            ends = (self.integers("", [index]), self.integers("", [index + 1]))
            cut = self.add("Slice", packed, *ends, axis, module=self.module)
            yield self.add("Squeeze", cut, axis, module=self.module)

    def integers(self, name: str, values: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        named = f"{self.module}.{name}" if name else f"integer_{values[0]}"
        return self.inserter.initializer(named, np.asarray(values, np.int64))

    def together(self, name: str, parts: Sequence[npt.NDArray[np.generic]]) -> ir.Value:
        return self.inserter.initializer(f"{self.linear}.{name}", np.concatenate(parts, axis=-1))

    def add(
        self,
        op_type: str,
        *inputs: ir.Value,
        perm: list[int] | None = None,
        module: str | None = None,
        shape: ir.Shape | None = None,
    ) -> ir.Value:
        dtype = next(value.dtype for value in inputs if value.dtype is not None)
        return self.inserter.node(
            op_type,
            inputs,
            dtype=dtype,
            module=self.linear if module is None else module,
            attributes=None if perm is None else {"perm": perm},
            before=self.before,
            shape=shape,
        )


def _per_channel(projection: _Projection, index: int) -> npt.NDArray[np.generic]:
    """A scale or zero-point of a weight [K, n], one for each of its n channels (and each block of K)."""
    assert projection.dq is not None
    array = constant_of(projection.dq.inputs[index])
    assert array is not None
    return np.full(projection.size[1], array.item(), array.dtype) if array.size == 1 and array.ndim < 2 else array
