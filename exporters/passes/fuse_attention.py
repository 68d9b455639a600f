"""Write every attention as one `Attention` operator (ONNX opset 23), whatever its source wrote.

    Softmax(Reshape(Reshape(MatMul(q · s, kᵀ) · t + bias) + windows)) · v   →   Attention(q, k, v, mask, scale = s · t)

Passed on the way: scales of q, of k and of the scores; additive masks and Where with a constant; the Reshape pair
around a mask of shifted windows; casts; and the guard of PyTorch's decomposition, Where(IsNaN(p), 0, p), which moves to
the output: a row of scores that is NaN is a row of the output that is NaN.

A mask that is the same for every input becomes one constant, or nothing where it masks nothing. A mask that differs
between the W windows of an image, [W, heads, N, M], would have to be repeated over the batch. Windows become heads
instead, a Reshape that moves nothing, and the mask is [1, W · heads, N, M], which broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from exporters.attention_mask import LOWEST, RANK, Array, add_masks, additive, is_neutral, known_mask
from exporters.module_names import MODULE_KEY
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import LeftAlone, Outcome

OPSET = 23
LOWERED_KEY = "gpusq.attention"  # on the Softmax of an attention that was written out on purpose
_PASSED = frozenset({"Cast", "Identity", "Dropout"})


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
            return Outcome("fuse attention", 0, (LeftAlone("Attention", f"the operator exists from opset {OPSET} on"),))
        inserter = Inserter(model.graph)
        changed, left = 0, []
        for node in list(model.graph):
            if node.domain or node.op_type not in ("Softmax", "Attention"):
                continue
            if self.lowered and LOWERED_KEY in node.metadata_props:
                continue
            try:
                changed += _fuse(node, inserter) if node.op_type == "Softmax" else _simplify(node, inserter)
            except _NotFusedError as why:
                left.append(LeftAlone(node.metadata_props.get(MODULE_KEY) or node.name or "", str(why)))
        if changed:
            _remove_dead(model.graph)
        return Outcome("fuse attention", changed, tuple(left))


class _NotFusedError(Exception):
    """Why an attention stays as it is written."""


@dataclass(frozen=True)
class _Scores:
    """What stands between q·kᵀ and the softmax.

    Attributes:
        product: the MatMul of q and kᵀ.
        scale: what the product is multiplied by.
        known: the sum of the masks that are the same for every input.
        others: masks that are not, each to be added.
    """

    product: ir.Node
    scale: float = 1.0
    known: Array | None = None
    others: tuple[ir.Value, ...] = field(default=())


def _fuse(softmax: ir.Node, inserter: Inserter) -> bool:
    """Fuse one attention that is written out; a softmax that is none is passed over."""
    scores_in = softmax.inputs[0]
    product, guard = _product_with_v(softmax.outputs[0])
    if product is None or scores_in is None or scores_in.shape is None:
        return False
    rank = len(scores_in.shape)
    if softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        raise _NotFusedError("its softmax is not along the keys")
    scores = _scores(scores_in)
    if isinstance(scores, str):
        raise _NotFusedError(scores)
    if scores.product.outputs[0].shape is None or len(scores.product.outputs[0].shape) not in (RANK - 1, RANK):
        raise _NotFusedError("its scores are neither 3-D nor 4-D")
    q, q_scale = _unscaled(scores.product.inputs[0])
    kt, k_scale = _unscaled(scores.product.inputs[1])
    v = product.inputs[1]
    assert v is not None
    building = _Building(inserter, product, scores.product.metadata_props.get(MODULE_KEY, ""))
    k = building.transpose_last(kt)
    out = building.attention((q, k, v), scores, scale=scores.scale * q_scale * k_scale)
    if guard:
        out = building.without_nan(out)
    out.shape = product.outputs[0].shape
    inserter.replace(product, out)
    return True


def _simplify(node: ir.Node, inserter: Inserter) -> bool:
    """Give an Attention node the smallest mask that means the same."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
        return False
    known = known_mask(mask)
    q, k, v = node.inputs[:3]
    if known is None or q is None or k is None or v is None or q.shape is None or len(q.shape) != RANK:
        return False
    if ir.convenience.get_const_tensor(mask) is not None and len(known) == 1 and not is_neutral(known):
        return False
    scale = node.attributes.get("scale")
    building = _Building(inserter, node, node.metadata_props.get(MODULE_KEY, ""), dict(node.attributes))
    out = building.attention((q, k, v), _Scores(node, known=known), None if scale is None else scale.as_float())
    out.shape = node.outputs[0].shape
    inserter.replace(node, out)
    return True


@dataclass(frozen=True)
class _Building:
    """New nodes in the place of `old`."""

    inserter: Inserter
    old: ir.Node
    module: str
    attributes: dict[str, ir.Attr] = field(default_factory=dict)

    def attention(self, qkv: Sequence[ir.Value], scores: _Scores, scale: float | None) -> ir.Value:
        known = scores.known
        if known is not None and is_neutral(known):
            known = None
        windows = 1 if known is None else len(known)
        if windows > 1 and scores.others:
            raise _NotFusedError("it has masks of windows and others that depend on the input")
        rank = len(_shape(qkv[0]))
        if rank == RANK - 1:
            out = self.attend([self.add("Unsqueeze", x, self.axis(1)) for x in qkv], self.mask(scores, known), scale)
            return self.add("Squeeze", out, self.axis(1))
        if windows == 1:
            return self.attend(qkv, self.mask(scores, known), scale)
        assert known is not None
        shape = _shape(qkv[0])
        heads = shape[1]
        if not isinstance(heads, int):
            raise _NotFusedError("its number of heads is not known")
        spread = np.broadcast_to(known, (windows, heads, *known.shape[2:]))
        folded = [self.reshape(x, [-1, windows * heads, *_shape(x)[2:]]) for x in qkv]
        mask = self.constant("mask", spread.reshape(1, windows * heads, *known.shape[2:]), qkv[0])
        out = self.attend(folded, mask, scale)
        return self.reshape(out, [-1, heads, shape[2], _shape(qkv[2])[3]])

    def attend(self, qkv: Sequence[ir.Value], mask: ir.Value | None, scale: float | None) -> ir.Value:
        attributes = self.attributes | ({} if scale is None else {"scale": ir.AttrFloat32("scale", scale)})
        out = self.add("Attention", *qkv, *([] if mask is None else [mask]))
        node = out.producer()
        assert node is not None
        for attribute in attributes.values():
            node.attributes.add(attribute)
        out.shape = ir.Shape([*_shape(qkv[0])[:3], _shape(qkv[2])[3]])
        return out

    def mask(self, scores: _Scores, known: Array | None) -> ir.Value | None:
        """The masks as one value, added up."""
        values = list(scores.others)
        if known is not None:
            values.append(self.constant("mask", known, scores.product.outputs[0]))
        total: ir.Value | None = None
        for value in values:
            total = value if total is None else self.add("Add", total, value)
        return total

    def transpose_last(self, value: ir.Value) -> ir.Value:
        """`value` with its last two axes exchanged; what a Transpose did before is taken into the new one."""
        rank = len(_shape(value))
        perm = [*range(rank - 2), rank - 1, rank - 2]
        node = value.producer()
        if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
            before = list(node.attributes["perm"].as_ints())
            perm, value = [before[axis] for axis in perm], node.inputs[0]
        if perm == [*range(rank)]:
            return value
        out = self.add("Transpose", value, perm=perm)
        out.shape = ir.Shape([_shape(value)[axis] for axis in perm])
        return out

    def without_nan(self, value: ir.Value) -> ir.Value:
        zero = self.constant("zero", np.zeros((), np.float32), value)
        bad = self.add("IsNaN", value)
        bad.type = ir.TensorType(ir.DataType.BOOL)
        return self.add("Where", bad, zero, value)

    def reshape(self, value: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        dims = np.asarray([dim if isinstance(dim, int) else -1 for dim in shape], np.int64)
        name = f"{self.module}.shape{'x'.join(map(str, dims[1:]))}"
        out = self.add("Reshape", value, self.inserter.initializer(name, dims))
        out.shape = ir.Shape([None if dim == -1 else dim for dim in shape])
        return out

    def axis(self, axis: int) -> ir.Value:
        return self.inserter.initializer(f"axis_{axis}", np.asarray([axis], np.int64))

    def constant(self, name: str, array: Array, like: ir.Value) -> ir.Value:
        assert like.dtype is not None
        return self.inserter.initializer(f"{self.module}.{name}", np.ascontiguousarray(array, like.dtype.numpy()))

    def add(self, op_type: str, *inputs: ir.Value, perm: list[int] | None = None) -> ir.Value:
        dtype = inputs[0].dtype
        assert dtype is not None
        return self.inserter.node(
            op_type,
            inputs,
            dtype=dtype,
            module=self.module,
            attributes=None if perm is None else {"perm": perm},
            before=self.old,
        )


def _product_with_v(value: ir.Value) -> tuple[ir.Node | None, bool]:
    """The MatMul that multiplies the probabilities by v, and whether NaN rows are set to 0 on the way."""
    guarded = False
    while True:
        users = [node for node, index in value.uses()]
        where = [node for node in users if node.op_type == "Where" and node.inputs[2] is value]
        if len(users) == 2 and len(where) == 1 and _is_guard(where[0], value):
            guarded, value = True, where[0].outputs[0]
        elif len(users) == 1 and users[0].op_type in _PASSED:
            value = users[0].outputs[0]
        elif len(users) == 1 and users[0].op_type == "MatMul" and users[0].inputs[0] is value:
            return users[0], guarded
        else:
            return None, False


def _is_guard(where: ir.Node, value: ir.Value) -> bool:
    condition, zero = where.inputs[0], where.inputs[1]
    asked = None if condition is None else condition.producer()
    return (
        asked is not None
        and asked.op_type == "IsNaN"
        and asked.inputs[0] is value
        and zero is not None
        and _scalar(zero) == 0
    )


def _scores(value: ir.Value, scale: float = 1.0) -> _Scores | str:
    """Follow the scores back to q·kᵀ; the reason where they do not lead there."""
    node = value.producer()
    if node is None or len(value.uses()) != 1:
        return "its scores are read elsewhere"
    if node.op_type == "MatMul":
        return _Scores(node, scale)
    if node.op_type in _PASSED or node.op_type == "Reshape":
        x = node.inputs[0]
        return _scores(x, scale) if x is not None and _keeps_rows(x, value) else "its scores are reshaped"
    if node.op_type in ("Mul", "Div"):
        return _scaled_scores(node, scale)
    if node.op_type == "Add":
        return _masked_scores(node, scale)
    if node.op_type == "Where":
        return _chosen_scores(node, scale)
    return f"a {node.op_type} stands between its scores and the softmax"


def _scaled_scores(node: ir.Node, scale: float) -> _Scores | str:
    for index, x in enumerate(node.inputs):
        other = node.inputs[1 - index]
        factor = None if other is None else _scalar(other)
        if factor and x is not None and (node.op_type == "Mul" or index == 0):
            return _scores(x, scale * (factor if node.op_type == "Mul" else 1 / factor))
    return "its scores are multiplied by more than a constant"


def _masked_scores(node: ir.Node, scale: float) -> _Scores | str:
    for index, x in enumerate(node.inputs):
        mask = node.inputs[1 - index]
        found = _scores(x, scale) if x is not None else ""
        if isinstance(found, _Scores) and mask is not None:
            return _with_mask(found, mask, scale, len(_shape(node.outputs[0])))
    return "its scores are no sum of a product and a mask"


def _with_mask(scores: _Scores, mask: ir.Value, scale: float, rank: int) -> _Scores | str:
    """Add a mask that stands where the scores have `rank` axes and are still to be multiplied by `scale`."""
    constant = ir.convenience.get_const_tensor(mask)
    if rank == RANK + 1:  # [batch, windows, heads, N, M]
        array = None if constant is None else additive(constant.numpy())
        if array is None or array.ndim != rank or len(array) != 1:
            return "a mask of its windows depends on the input"
        known: Array | None = array[0]
    elif rank == RANK - 1 and constant is not None:  # [batch · heads, N, M]
        known = additive(constant.numpy()).reshape(-1, 1, *constant.shape.numpy()[-2:])
    else:
        known = known_mask(mask)
    if known is None:
        shape = mask.shape
        if scale != 1 or rank != RANK or shape is None or len(shape) > RANK or mask.dtype == ir.DataType.BOOL:
            return "a mask that depends on the input is scaled or has another rank"
        return replace(scores, others=(*scores.others, mask))
    known = known * np.float32(scale)
    total = known if scores.known is None else add_masks(scores.known, known)
    return "its masks do not fit each other" if total is None else replace(scores, known=total)


def _chosen_scores(node: ir.Node, scale: float) -> _Scores | str:
    """Where(mask, scores, fill) or Where(mask, fill, scores), the mask a constant and fill low."""
    chosen, first, second = node.inputs
    constant = None if chosen is None else ir.convenience.get_const_tensor(chosen)
    for x, fill, kept in ((first, second, True), (second, first, False)):
        low = None if fill is None else _scalar(fill)
        if x is None or low is None or low > LOWEST or constant is None:
            continue
        found = _scores(x, scale)
        if isinstance(found, _Scores) and len(_shape(node.outputs[0])) == RANK:
            shape = constant.shape.numpy()
            known = additive((constant.numpy() == kept).reshape((1,) * (RANK - len(shape)) + tuple(shape)))
            total = known if found.known is None else add_masks(found.known, known)
            return "its masks do not fit each other" if total is None else replace(found, known=total)
    return "its scores are chosen by a condition that depends on the input"


def _keeps_rows(before: ir.Value, after: ir.Value) -> bool:
    """Whether the last three axes, heads, queries and keys, are the same before and after."""
    if before.shape is None or after.shape is None:
        return False
    return list(before.shape)[-3:] == list(after.shape)[-3:]


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """What is multiplied by a constant, behind transposes of it too, and the constant."""
    assert value is not None
    node = value.producer()
    if node is not None and node.op_type in ("Mul", "Div") and len(value.uses()) == 1:
        for x, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            factor = None if other is None else _scalar(other)
            if factor and x is not None and (node.op_type == "Mul" or x is node.inputs[0]):
                inner, scale = _unscaled(x)
                return inner, scale * (factor if node.op_type == "Mul" else 1 / factor)
    return value, 1.0


def _scalar(value: ir.Value) -> float | None:
    constant = ir.convenience.get_const_tensor(value)
    return float(constant.numpy().reshape(())) if constant is not None and constant.size == 1 else None


def _shape(value: ir.Value) -> list[int | ir.SymbolicDim]:
    if value.shape is None:
        raise _NotFusedError("its shapes are not known")
    return list(value.shape)


def _remove_dead(graph: ir.Graph) -> None:
    """Remove what only the replaced nodes read."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    drop_unused_initializers(graph)
