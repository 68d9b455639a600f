"""Make one GEMM of the projections to q, k and v that have different numbers of heads, or are worked on before they
meet: rotated, normalized, appended to a cache, repeated.

    x·Wq → [B, N, 9, d] → [B, 9, N, d] → rotated ──────────► q       x·[Wq Wk Wv] → [B, N, 15, d] → [B, 15, N, d]
    x·Wk → [B, N, 3, d] → [B, 3, N, d] → rotated ─► cache ─► k   →                   │ Split 9, 3, 3
    x·Wv → [B, N, 3, d] → [B, 3, N, d] ───────────► cache ─► v                       ├► rotated ──────────► q   …

`merge_projections.py` packs those of equal heads that go to Attention as they are. The compiler makes one GEMM of both
writings; of one tensor it also makes one kernel of all that follows up to the attention, instead of three: 10 kernels a
block in a decoder's step, not 12 (SmolLM2-135M with INT8 linears, sm80: 304 instead of 363). Each output channel keeps
its column, so no number changes. The weights are put together when they are read, which is when the graph is saved.

Weights that are quantized already keep their integers, and their scales, side by side: one for each channel, which is
the same number n times where there was one for a whole weight. Their inputs must be quantized with one scale; the
quantizer of the first then serves all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.known_sizes import KnownSizes
from exporters.linears import array_shape
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.joined_weights import joined_bias, joined_name, joined_parameter, joined_weight, made_for_one
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused
from exporters.qdq_scales import constant_of, input_at

_TO_HEADS = (0, 2, 1, 3)
# What may stand between a projection's heads and the attention.
_BETWEEN = frozenset(
    {
        "Add", "Cast", "Concat", "Expand", "LayerNormalization", "Mul", "Neg", "Reshape", "RMSNormalization",
        "RotaryEmbedding", "Slice", "Split", "Sub", "Transpose", "Unsqueeze",
    }
)  # fmt: skip


@dataclass(frozen=True)
class MergeGroupedProjections:
    """Merge two or three projections of each Attention node."""

    def __call__(self, model: ir.Model) -> Outcome:
        """Merge them; those that read the same and cannot be one are reported with the reason."""
        inserter, changed, left = Inserter(model.graph), 0, []
        order = {node: index for index, node in enumerate(model.graph)}
        for node in [node for node in order if node.op_type == "Attention" and not node.domain]:
            for group in _groups(node):
                if why := _why_not(group):
                    left.append(LeftAlone(label_of(node), why))
                    continue
                _Merging(inserter, group, min((each.matmul for each in group), key=order.__getitem__)).run()
                changed += 1
        if changed:
            drop_unused(model)
        return Outcome("merge grouped projections", changed, tuple(left))


@dataclass(frozen=True)
class _Projection:
    """x·W + b as heads.

    Attributes:
        matmul: x·W, W a constant [K, H · d], or one that is dequantized.
        bias: [H · d], if there is one.
        reshape: to [B, N, H, d].
        transpose: to [B, H, N, d].
    """

    matmul: ir.Node
    bias: ir.Value | None
    reshape: ir.Node
    transpose: ir.Node

    @property
    def x(self) -> ir.Value | None:
        """What is multiplied, or quantized ahead of that."""
        quantizer = None if self.input_dq is None else made_by(self.input_dq.inputs[0], "QuantizeLinear")
        return self.matmul.inputs[0] if quantizer is None else quantizer.inputs[0]

    @property
    def input_dq(self) -> ir.Node | None:
        return made_by(self.matmul.inputs[0], "DequantizeLinear")

    @property
    def weight_dq(self) -> ir.Node | None:
        return made_by(self.matmul.inputs[1], "DequantizeLinear")

    @property
    def weight(self) -> ir.Value:
        """W as it is stored."""
        weight = self.matmul.inputs[1] if self.weight_dq is None else self.weight_dq.inputs[0]
        assert weight is not None
        return weight

    @property
    def module(self) -> str:
        return self.matmul.metadata_props.get(MODULE_KEY, "")


def _groups(attention: ir.Node) -> Iterator[list[_Projection]]:
    """The projections that lead to q, k and v and read one tensor, two at least."""
    by_source: dict[ir.Value | None, list[_Projection]] = {}
    seen: set[ir.Node] = set()
    for value in attention.inputs[:3]:
        for projection in _projections(value, seen):
            by_source.setdefault(projection.x, []).append(projection)
    yield from (group for group in by_source.values() if len(group) > 1)


def _projections(value: ir.Value | None, seen: set[ir.Node]) -> Iterator[_Projection]:
    """Those that `value` is made of, each once."""
    waiting = [value]
    while waiting:
        made = waiting.pop()
        node = None if made is None else made.producer()
        if node is None or node in seen or node.domain or node.op_type not in _BETWEEN:
            continue
        seen.add(node)
        if (projection := _projection(node)) is not None:
            yield projection
        else:
            waiting += node.inputs


def _projection(transpose: ir.Node) -> _Projection | None:
    """The projection that ends in `transpose`, each step of which nothing else reads."""
    if transpose.op_type != "Transpose" or tuple(transpose.attributes.get_ints("perm", ())) != _TO_HEADS:
        return None
    reshape = made_for_one(transpose.inputs[0], "Reshape")
    before = None if reshape is None else reshape.inputs[0]
    matmul, bias = made_for_one(before, "MatMul"), None
    if matmul is None and (add := made_for_one(before, "Add")) is not None:
        found = [(made_for_one(x, "MatMul"), bias) for x, bias in (add.inputs, add.inputs[::-1])]
        matmul, bias = next((pair for pair in found if pair[0] is not None), (None, None))
        if not _is_constant(bias, 1):
            return None
    if reshape is None or matmul is None:
        return None
    projection = _Projection(matmul, bias, reshape, transpose)
    return projection if _is_constant(projection.weight, 2) else None


def _is_constant(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.is_initializer() and len(array_shape(value)) == rank


def _why_not(group: Sequence[_Projection]) -> str:
    heads = [_heads(projection) for projection in group]
    if any(found is None for found in heads):
        return "its projections are not known to be [batch, tokens, heads, head size]"
    if len({found[1] for found in heads if found is not None}) > 1:
        return "its projections have heads of different sizes"
    if len({projection.weight.dtype for projection in group}) > 1:
        return "its projections have different types"
    return _why_not_quantized(group)


def _why_not_quantized(group: Sequence[_Projection]) -> str:
    weights, inputs = [each.weight_dq for each in group], [each.input_dq for each in group]
    if len({dq is None for dq in weights}) > 1 or len({dq is None for dq in inputs}) > 1:
        return "some of its projections are quantized and some are not"
    if any(dq is not None and _is_blocked(dq) for dq in weights):
        return "its weights have scales of blocks or along K"
    if not _all_same(dq.inputs[1] for dq in inputs if dq) or not _all_same(input_at(dq, 2) for dq in inputs if dq):
        return "the inputs of its projections have different scales"
    return ""


def _is_blocked(weight_dq: ir.Node) -> bool:
    scale = constant_of(weight_dq.inputs[1])
    along_k = scale is not None and scale.ndim == 1 and weight_dq.attributes.get_int("axis", 1) not in (1, -1)
    return scale is None or scale.ndim > 1 or along_k


def _all_same(parameters: Iterable[ir.Value | None]) -> bool:
    """Whether all are one value, or constants of the same bytes."""
    values = list(parameters)
    arrays = [constant_of(value) for value in values]
    known = {(array.dtype, array.tobytes()) for array in arrays if array is not None}
    return len(set(values)) <= 1 or (len(known) == 1 and all(array is not None for array in arrays))


def _heads(projection: _Projection) -> tuple[int, int] | None:
    """H and d of the [B, N, H, d] that it makes of [B, N, K]; None where it is not known to."""
    known = KnownSizes()
    x, made = known.dims(projection.x), known.dims(projection.reshape.outputs[0])
    if x is None or made is None or len(x) != 3 or len(made) != 4 or (x[0] != made[0] and x[1] != made[1]):
        return None
    heads, size = made[2:]
    if not isinstance(heads, int) or not isinstance(size, int) or heads * size != array_shape(projection.weight)[1]:
        return None
    return heads, size


@dataclass(frozen=True)
class _Merging:
    """One GEMM in the place of those of `group`, ahead of `before`."""

    inserter: Inserter
    group: Sequence[_Projection]
    before: ir.Node

    @property
    def module(self) -> str:
        """`layers.0.self_attn.q_proj+k_proj+v_proj`: the modules whose GEMM it is."""
        return joined_name([projection.module for projection in self.group]) or "projections"

    def run(self) -> None:
        """Replace them."""
        heads = self.heads(self.product())
        for projection, part in zip(self.group, heads, strict=True):
            part.shape = projection.transpose.outputs[0].shape
            self.inserter.replace(projection.transpose, part)

    def product(self) -> ir.Value:
        """x·[Wq Wk Wv] + [bq bk bv]."""
        x, source = self.before.inputs[0], self.group[0].x
        assert x is not None
        assert source is not None
        assert source.shape is not None
        shape = ir.Shape([*list(source.shape)[:2], sum(self.widths)])
        made = self.add("MatMul", x, self.weight(), shape=shape)
        return (
            made if all(each.bias is None for each in self.group) else self.add("Add", made, self.bias(), shape=shape)
        )

    @property
    def widths(self) -> list[int]:
        return [int(array_shape(projection.weight)[1]) for projection in self.group]

    def weight(self) -> ir.Value:
        joined = joined_weight(self.inserter, f"{self.module}.weight", [each.weight for each in self.group])
        dqs = [each.weight_dq for each in self.group if each.weight_dq is not None]
        if not dqs:
            return joined
        parameters = [joined]
        for index, name in ((1, "scale"), (2, "zero_point")):
            arrays = [constant_of(input_at(dq, index)) for dq in dqs]
            if any(array is not None for array in arrays):
                array = joined_parameter(arrays, self.widths)
                parameters.append(self.inserter.initializer(f"{self.module}.weight_{name}", array))
        made = self.add("DequantizeLinear", *parameters, shape=ir.Shape(array_shape(joined)))
        node = made.producer()
        assert node is not None
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
        return made

    def bias(self) -> ir.Value:
        joined = joined_bias([each.bias for each in self.group], self.widths)
        return self.inserter.initializer(f"{self.module}.bias", joined)

    def heads(self, product: ir.Value) -> Sequence[ir.Value]:
        """[B, N, H · d] as [B, H, N, d], and that taken apart into those of each projection."""
        found = [_heads(projection) for projection in self.group]
        counts, size = [heads for heads, _ in filter(None, found)], next(filter(None, found))[1]
        assert product.shape is not None
        batch, tokens = list(product.shape)[:2]
        target = [-1, tokens] if isinstance(tokens, int) else [0, 0]
        target_value = self.integers("heads", [*target, sum(counts), size])
        made = self.add("Reshape", product, target_value, shape=ir.Shape([batch, tokens, sum(counts), size]))
        made = self.add("Transpose", made, perm=_TO_HEADS, shape=ir.Shape([batch, sum(counts), tokens, size]))
        assert made.dtype is not None
        return self.inserter.nodes(
            "Split",
            [made, self.integers("split", counts)],
            dtype=made.dtype,
            module=self.module,
            attributes={"axis": 1},
            before=self.before,
            outputs=len(counts),
        )

    def integers(self, name: str, values: Sequence[int]) -> ir.Value:
        return self.inserter.initializer(f"{self.module}.{name}", np.asarray(values, np.int64))

    def add(self, op_type: str, *inputs: ir.Value, shape: ir.Shape, perm: Sequence[int] | None = None) -> ir.Value:
        projection = self.group[0]
        dtype = projection.matmul.outputs[0].dtype or projection.weight.dtype
        assert dtype is not None
        attributes = None if perm is None else {"perm": perm}
        return self.inserter.node(
            op_type, inputs, dtype=dtype, module=self.module, attributes=attributes, before=self.before, shape=shape
        )
