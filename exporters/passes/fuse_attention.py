"""Write every attention as one `Attention` operator (ONNX opset 23), whatever its source wrote.

    Softmax(Reshape(Reshape(MatMul(q · s, kᵀ) · t + bias) + windows)) · v   →   Attention(q, k, v, mask, scale = s · t)

`exporters.passes.written_attention` tells what is passed on the way. The guard of PyTorch's decomposition,
Where(IsNaN(p), 0, p), moves to the output: a row of probabilities that is NaN is a row of the output that is NaN.

A mask that is the same for every input becomes one constant, or nothing where it masks nothing. A mask that differs
between the W windows of an image, [W, heads, N, M], would have to be repeated over the batch. Windows become heads
instead, a Reshape that moves nothing, and the mask is [1, W · heads, N, M], which broadcasts.

A query that may attend to no key gets 0 from the operator, and NaN or the mean of v where attention is written out.
Where a constant mask has such a query, the attention stays as it is; where a mask depends on the input, the outcome
says so.

An attention whose query and key are one value stays written out too: TensorRT-RTX 1.7 crashes while it compiles the
operator with such inputs, and makes one kernel of MatMul, Softmax, MatMul all the same. `LowerAttention` follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from exporters.attention_mask import LOWEST, RANK, Array, is_neutral, known_mask, masks_a_query, storable
from exporters.module_names import MODULE_KEY, label_of
from exporters.passes.inserter import Inserter
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.products import made_by
from exporters.passes.put_in_place import drop_unused
from exporters.passes.written_attention import WrittenAttention, written_attention
from exporters.same_value import same_value

OPSET = 23
LOWERED_KEY = "gpusq.attention"  # on the Softmax of an attention that was written out on purpose
SAME = "its query and key are one value, with which the operator crashes TensorRT-RTX 1.7's compiler"
_NAME = "fuse attention"
_Dim = int | ir.SymbolicDim


@dataclass(frozen=True)
class FuseAttention:
    """Replace every attention that is written out, and simplify the masks of those that are not.

    Attributes:
        lowered: whether `LowerAttention` follows: the opset need not have the operator then, and what that pass wrote
            is its final form.
    """

    lowered: bool = False

    def __call__(self, model: ir.Model) -> Outcome:
        """Replace them; each that stays is reported with the reason."""
        if not self.lowered and (model.opset_imports.get("") or 0) < OPSET:
            return Outcome(_NAME, 0, (LeftAlone("Attention", f"the operator exists from opset {OPSET} on"),))
        inserter = Inserter(model.graph)
        changes: list[Change] = []
        left: list[LeftAlone] = []
        for node in [node for node in model.graph if not node.domain and node.op_type in ("Softmax", "Attention")]:
            if self.lowered and LOWERED_KEY in node.metadata_props:
                continue
            where = label_of(node)
            done = self._fuse(node, inserter) if node.op_type == "Softmax" else _simplify(node, inserter)
            if isinstance(done, _Done):
                changes.append(Change(where, done.what))
            elif done is not None:
                left.append(LeftAlone(where, done))
        if changes:
            drop_unused(model)
        return Outcome(_NAME, len(changes), tuple(left), tuple(changes))

    def _fuse(self, softmax: ir.Node, inserter: Inserter) -> _Done | str | None:
        """Fuse one attention that is written out; the reason why not, None where it is none."""
        found = written_attention(softmax)
        if not isinstance(found, WrittenAttention):
            return found
        parts = _parts(found)
        if why := _why_not(parts):
            return why
        building = _Building(inserter, found.product, found.scores.metadata_props.get(MODULE_KEY, ""))
        keys = building.keys(found.kt)
        if not self.lowered and same_value(found.q, keys):
            building.forget(keys)
            return SAME
        out = building.attention(replace(parts, k=keys))
        if found.guarded:
            out = building.without_nan(out)
        out.shape = found.product.outputs[0].shape
        inserter.replace(found.product, out)
        dynamic = "; its mask depends on the input: a query that it leaves no key gets 0"
        return _Done(f"written as one operator{dynamic if found.others and not found.guarded else ''}")


@dataclass(frozen=True)
class _Done:
    what: str


@dataclass(frozen=True)
class _Parts:
    """What an Attention node is made of: its inputs, the masks added up, and its attributes."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    known: Array | None
    others: tuple[ir.Value, ...]
    attributes: dict[str, ir.Attr] = field(default_factory=dict)

    @property
    def windows(self) -> int:
        return 1 if self.known is None else len(self.known)


def _parts(found: WrittenAttention) -> _Parts:
    known = None if found.known is None or _is_nothing(found.known) else found.known
    return _Parts(found.q, found.kt, found.v, known, found.others, {"scale": ir.AttrFloat32("scale", found.scale)})


def _simplify(node: ir.Node, inserter: Inserter) -> _Done | str | None:
    """Give an Attention node the smallest mask that means the same."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    q, k, v = node.inputs[:3]
    if mask is None or q is None or k is None or v is None or not _is_plain(node):
        return None
    known = known_mask(mask)
    if known is None or (mask.dtype != ir.DataType.BOOL and mask.dtype != q.dtype):
        return None
    if _is_simple(mask, known):
        return None
    parts = _Parts(q, k, v, None if _is_nothing(known) else known, (), dict(node.attributes))
    if why := _why_not(parts):
        return why
    out = _Building(inserter, node, node.metadata_props.get(MODULE_KEY, "")).attention(parts)
    out.shape = node.outputs[0].shape
    inserter.replace(node, out)
    return _Done("its mask is no constant any more" if parts.known is None else "its mask is one constant")


def _is_plain(node: ir.Node) -> bool:
    """Whether it has one output, 4-D inputs, no cache and no causality of its own."""
    four = all(value is not None and value.shape is not None and len(value.shape) == RANK for value in node.inputs[:3])
    cache = any(value is not None for value in node.inputs[4:])
    return four and not cache and len(node.outputs) == 1 and not node.attributes.get_int("is_causal", 0)


def _is_simple(mask: ir.Value, known: Array) -> bool:
    """Whether it is a constant that needs no change."""
    constant = ir.convenience.get_const_tensor(mask)
    small = len(known) == 1 and not (is_neutral(known) and not masks_a_query(known))
    finite = mask.dtype == ir.DataType.BOOL or bool((known >= LOWEST).all())
    return constant is not None and small and finite


def _is_nothing(mask: Array) -> bool:
    return is_neutral(mask) and not masks_a_query(mask)


def _why_not(parts: _Parts) -> str:
    """Why there is no operator for it."""
    if parts.known is None:
        return ""
    if masks_a_query(parts.known):
        return "its mask leaves some query no key"
    return _why_not_folded(parts) if parts.windows > 1 and len(_shape(parts.q)) == RANK else ""


def _why_not_folded(parts: _Parts) -> str:
    """Why windows cannot become heads."""
    q, k, v = _shape(parts.q), _shape(parts.k), _shape(parts.v)
    if parts.others:
        return "it has a mask of windows and one that depends on the input"
    if not all(isinstance(dim, int) for dim in (*q[1:], *k[1:], *v[1:])):
        return "its windows have an unknown number of heads or tokens"
    if not q[1] == k[1] == v[1]:
        return "its query heads share key heads"
    batch = q[0]
    return "its mask has more windows than there are" if isinstance(batch, int) and batch % parts.windows else ""


@dataclass(frozen=True)
class _Building:
    """New nodes in the place of `old`."""

    inserter: Inserter
    old: ir.Node
    module: str

    def attention(self, parts: _Parts) -> ir.Value:
        rank = len(_shape(parts.q))
        if rank < RANK:
            return self.unstacked(parts)
        return self.folded(parts) if parts.windows > 1 else self.attend(parts, self.mask(parts))

    def unstacked(self, parts: _Parts) -> ir.Value:
        """[batch · heads, N, d] as a batch of one head each."""
        q, k, v = (self.unsqueeze(value) for value in (parts.q, parts.k, parts.v))
        lifted = replace(parts, q=q, k=k, v=v)
        return self.add("Squeeze", self.attend(lifted, self.mask(lifted)), self.integers([1]))

    def folded(self, parts: _Parts) -> ir.Value:
        """[batch · W, heads, N, d] as [batch, W · heads, N, d]."""
        known = parts.known
        assert known is not None
        batch, heads, tokens, _ = _shape(parts.q)
        assert isinstance(heads, int)
        together = len(known) * heads
        q, k, v = (self.reshape(x, [-1, together, *_shape(x)[2:]]) for x in (parts.q, parts.k, parts.v))
        spread = np.broadcast_to(known, (len(known), heads, *known.shape[2:])).reshape(1, together, *known.shape[2:])
        as_heads = replace(parts, q=q, k=k, v=v, known=spread)
        out = self.reshape(self.attend(as_heads, self.mask(as_heads)), [-1, heads, tokens, _shape(v)[3]])
        out.shape = ir.Shape([batch, heads, tokens, _shape(v)[3]])
        return out

    def attend(self, parts: _Parts, mask: ir.Value | None) -> ir.Value:
        out = self.add("Attention", parts.q, parts.k, parts.v, *([] if mask is None else [mask]))
        node = out.producer()
        assert node is not None
        for attribute in parts.attributes.values():
            node.attributes.add(attribute)
        out.shape = ir.Shape([*_shape(parts.q)[:3], _shape(parts.v)[3]])
        return out

    def mask(self, parts: _Parts) -> ir.Value | None:
        """The masks as one value, added up, with all queries and keys."""
        tokens = [_shape(parts.q)[2], _shape(parts.k)[2]]
        values = list(parts.others)
        if parts.known is not None:
            values.append(self.constant("mask", _spread(storable(parts.known), tokens), parts.q))
        total: ir.Value | None = None
        for value in values:
            total = value if total is None else self.sum(total, value)
        return total if total is None or _has(total, tokens) else self.spread(total, parts)

    def sum(self, first: ir.Value, second: ir.Value) -> ir.Value:
        out = self.add("Add", first, second)
        out.shape = ir.Shape(_broadcast(_shape(first), _shape(second)))
        return out

    def spread(self, mask: ir.Value, parts: _Parts) -> ir.Value:
        """The mask repeated along the queries and keys, where onnxruntime's operator does not broadcast it."""
        tokens = [_shape(parts.q)[2], _shape(parts.k)[2]]
        if all(isinstance(dim, int) for dim in tokens):
            return self.expand(mask, self.integers([1, 1, *tokens]), tokens)
        lengths = [self.integers([1, 1]), self.length(parts.q), self.length(parts.k)]
        return self.expand(mask, self.add("Concat", *lengths, axis=0), tokens)

    def expand(self, mask: ir.Value, shape: ir.Value, tokens: Sequence[_Dim]) -> ir.Value:
        out = self.add("Expand", mask, shape)
        out.shape = ir.Shape([*_broadcast(_shape(mask), [1, 1, 1, 1])[:2], *tokens])
        return out

    def length(self, value: ir.Value) -> ir.Value:
        """How many tokens there are, [1]."""
        out = self.add("Shape", value, start=2, end=3)
        out.type = ir.TensorType(ir.DataType.INT64)
        return out

    def keys(self, kt: ir.Value) -> ir.Value:
        """The keys with their last two axes exchanged; what a Transpose did before is taken into the new one."""
        rank = len(_shape(kt))
        perm = [*range(rank - 2), rank - 1, rank - 2]
        node = made_by(kt, "Transpose")
        if node is not None and node.inputs[0] is not None:
            before = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
            perm, kt = [before[axis] for axis in perm], node.inputs[0]
        if perm == [*range(rank)]:
            return kt
        out = self.add("Transpose", kt, perm=perm)
        out.shape = ir.Shape([_shape(kt)[axis] for axis in perm])
        return out

    def forget(self, keys: ir.Value) -> None:
        """Take back what `keys` added for nothing."""
        node = keys.producer()
        if node is not None and not keys.uses() and not keys.is_graph_output():
            self.inserter.graph.remove(node, safe=True)

    def without_nan(self, value: ir.Value) -> ir.Value:
        bad = self.add("IsNaN", value)
        bad.type, bad.shape = ir.TensorType(ir.DataType.BOOL), value.shape
        out = self.add("Where", bad, self.constant("zero", np.zeros((), np.float32), value), value)
        out.type = value.type
        return out

    def unsqueeze(self, value: ir.Value) -> ir.Value:
        out = self.add("Unsqueeze", value, self.integers([1]))
        batch, *rest = _shape(value)
        out.shape = ir.Shape([batch, 1, *rest])
        return out

    def reshape(self, value: ir.Value, shape: Sequence[_Dim]) -> ir.Value:
        out = self.add("Reshape", value, self.integers(shape))
        out.shape = ir.Shape([None if dim == -1 else dim for dim in shape])
        return out

    def integers(self, values: Sequence[_Dim]) -> ir.Value:
        name = f"{self.module}.shape_{'x'.join(map(str, values))}".removeprefix(".")
        return self.inserter.initializer(name, np.asarray(values, np.int64))

    def constant(self, name: str, array: Array, like: ir.Value) -> ir.Value:
        assert like.dtype is not None
        name = f"{self.module}.{name}".removeprefix(".")
        return self.inserter.initializer(name, np.ascontiguousarray(array).astype(like.dtype.numpy()))

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        dtype = inputs[0].dtype
        assert dtype is not None
        return self.inserter.node(
            op_type, inputs, dtype=dtype, module=self.module, attributes=attributes, before=self.old
        )


def _spread(mask: Array, tokens: Sequence[_Dim]) -> Array:
    """The mask repeated along the queries and keys whose number is known."""
    lengths = [dim if isinstance(dim, int) else length for dim, length in zip(tokens, mask.shape[-2:], strict=True)]
    return np.broadcast_to(mask, (*mask.shape[:-2], *lengths))


def _has(mask: ir.Value, tokens: Sequence[_Dim]) -> bool:
    """Whether the last two axes of a mask are all the queries and keys."""
    given = _shape(mask)[-2:]
    return len(given) == 2 and all(
        dim == length or (isinstance(dim, int) and dim > 1) for dim, length in zip(given, tokens, strict=True)
    )


def _broadcast(first: Sequence[_Dim], second: Sequence[_Dim]) -> list[_Dim]:
    """The shape of a sum, where one axis is 1 or both are the same."""
    rank = max(len(first), len(second))
    left, right = ([*([1] * (rank - len(shape))), *shape] for shape in (first, second))
    return [b if a == 1 else a for a, b in zip(left, right, strict=True)]


def _shape(value: ir.Value) -> list[_Dim]:
    assert value.shape is not None
    return list(value.shape)
