"""Find the attentions that a graph writes out: softmax(q·kᵀ · scale + masks) · v, in whatever order its source has it.

The scores are followed back from the softmax to q·kᵀ, through scales, additive masks, Where with a constant, casts, and
the Reshape pair around a mask of shifted windows. The probabilities are followed on to v, through casts, a Dropout
that drops nothing, and the guard of PyTorch's decomposition, Where(IsNaN(p), 0, p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from exporters.attention_mask import MASKED, RANK, Array, add_masks, excluded, known_mask, scaled
from exporters.passes.products import made_by, scalar
from exporters.qdq_scales import input_at

_NO_PRODUCT = "its scores are no product of q and k"


@dataclass(frozen=True)
class WrittenAttention:
    """One attention.

    Attributes:
        scores: the MatMul of q and kᵀ.
        product: the MatMul of the probabilities and v.
        q: [batch, heads, N, d] or [batch · heads, N, d], before it is scaled.
        kt: the keys with their last two axes exchanged, before they are scaled.
        v: [batch, heads, M, dv] or [batch · heads, M, dv].
        scale: what q·kᵀ is multiplied by.
        known: the sum of the masks that are the same for every input.
        others: masks that are not, each to be added.
        guarded: whether a query whose probabilities are NaN gets 0.
    """

    scores: ir.Node
    product: ir.Node
    q: ir.Value
    kt: ir.Value
    v: ir.Value
    scale: float
    known: Array | None
    others: tuple[ir.Value, ...]
    guarded: bool


def written_attention(softmax: ir.Node) -> WrittenAttention | str | None:
    """The attention around a Softmax node; why it cannot be one operator; None where it is no attention."""
    found = _product_with_v(softmax.outputs[0])
    if found is None or isinstance(found, str):
        return found
    product, guarded = found
    scores_in, v = softmax.inputs[0], product.inputs[1]
    if scores_in is None or v is None or scores_in.shape is None:
        return "its shapes are not known"
    if softmax.attributes.get_int("axis", -1) not in (-1, len(scores_in.shape) - 1):
        return "its softmax is not along the keys"
    scores = _scores(scores_in)
    if isinstance(scores, str):
        return scores
    q, q_scale = _unscaled(scores.product.inputs[0])
    kt, k_scale = _unscaled(scores.product.inputs[1])
    if why := _why_not(q, kt, v):
        return why
    if any(mask.dtype != q.dtype for mask in scores.others):
        return "its mask has another type than its query"
    scale = scores.scale * q_scale * k_scale
    if scale < 0:  # onnxruntime has no kernel
        return "its scores are multiplied by a negative number"
    return WrittenAttention(scores.product, product, q, kt, v, scale, scores.known, scores.others, guarded)


def _why_not(q: ir.Value, kt: ir.Value, v: ir.Value) -> str:
    shapes = [value.shape for value in (q, kt, v)]
    if any(shape is None or len(shape) not in (RANK - 1, RANK) for shape in shapes):
        return "its q, k and v are neither 3-D nor 4-D"
    if len({len(shape) for shape in shapes if shape is not None}) > 1:
        return "its q, k and v have different ranks"
    if len({value.dtype for value in (q, kt, v)}) > 1:
        return "its q, k and v have different types"
    batches, *heads = zip(*(tuple(shape)[:-2] for shape in shapes if shape is not None), strict=True)
    if len({dim if isinstance(dim, int) else None for dim in batches}) > 1:
        return "its q, k and v have different batches"
    return "its query heads share key heads" if heads and any(dim != heads[0][0] for dim in heads[0]) else ""


@dataclass(frozen=True)
class _Scores:
    product: ir.Node
    scale: float
    known: Array | None = None
    others: tuple[ir.Value, ...] = ()


def _product_with_v(value: ir.Value) -> tuple[ir.Node, bool] | str | None:
    """The MatMul that multiplies the probabilities by v, and whether they are guarded against NaN on the way."""
    guarded = False
    while True:
        users = [node for node, _ in value.uses()]
        guard = next((node for node in users if _is_guard(node, value)), None)
        if value.is_graph_output() or len(users) > (1 if guard is None else 2):
            multiplied = any(node.op_type == "MatMul" and node.inputs[0] is value for node in users)
            return "its probabilities are read elsewhere" if multiplied or guard is not None else None
        if guard is not None:
            guarded, value = True, guard.outputs[0]
        elif users and _is_passed(users[0]):
            value = users[0].outputs[0]
        elif users and users[0].op_type == "MatMul" and not users[0].domain and users[0].inputs[0] is value:
            return users[0], guarded
        else:
            return None


def _is_guard(where: ir.Node, value: ir.Value) -> bool:
    if where.op_type != "Where" or where.inputs[2] is not value or scalar(where.inputs[1]) != 0:
        return False
    asked = made_by(where.inputs[0], "IsNaN")
    return asked is not None and asked.inputs[0] is value and len(asked.outputs[0].uses()) == 1


def _is_passed(node: ir.Node) -> bool:
    """Whether the output is the input, but for the type of float."""
    if node.domain or node.op_type not in ("Cast", "Dropout", "Identity"):
        return False
    if node.op_type == "Dropout":
        training = input_at(node, 2)
        return training is None or scalar(training) == 0
    types = [None if value is None else value.dtype for value in (node.inputs[0], node.outputs[0])]
    return all(dtype is not None and dtype.is_floating_point() for dtype in types)


def _scores(value: ir.Value, scale: float = 1.0) -> _Scores | str:
    """Follow the scores, still to be multiplied by `scale`, back to q·kᵀ; the reason where they do not lead there."""
    node = value.producer()
    if node is None or node.domain:
        return _NO_PRODUCT
    if len(value.uses()) != 1 or value.is_graph_output():
        return "its scores are read elsewhere"
    if node.op_type == "MatMul":
        return _Scores(node, scale)
    if node.op_type == "Reshape":
        x = node.inputs[0]
        return _scores(x, scale) if x is not None and _keeps_heads(x, value) else "its scores are reshaped"
    if _is_passed(node):
        return _inner(node.inputs[0], value, scale)
    if node.op_type in ("Mul", "Div"):
        return _scaled_scores(node, scale)
    if node.op_type == "Add":
        return _masked_scores(node, scale)
    if node.op_type == "Where":
        return _chosen_scores(node, scale)
    return f"a {node.op_type} stands between its scores and the softmax"


def _inner(x: ir.Value | None, value: ir.Value, scale: float) -> _Scores | str:
    """Follow an operand of the elementwise operator that makes `value`."""
    if x is None or not _keeps_shape(x, value):
        return "its scores are broadcast"
    return _scores(x, scale)


def _scaled_scores(node: ir.Node, scale: float) -> _Scores | str:
    found = _factor(node)
    if found is None:
        return "its scores are multiplied by more than a constant"
    return _inner(found[0], node.outputs[0], scale * found[1])


def _masked_scores(node: ir.Node, scale: float) -> _Scores | str:
    reasons = []
    for x, mask in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        found = _inner(x, node.outputs[0], scale)
        if isinstance(found, _Scores) and mask is not None:
            return _with_mask(found, mask, scale, len(node.outputs[0].shape or ()))
        reasons.append(str(found))
    return next((why for why in reasons if why != _NO_PRODUCT), _NO_PRODUCT)


def _with_mask(scores: _Scores, mask: ir.Value, scale: float, rank: int) -> _Scores | str:
    """Add a mask that stands where the scores have `rank` axes and are still to be multiplied by `scale`."""
    known = known_mask(mask, rank)
    if known is not None:
        return _with_known(scores, scaled(known, scale))
    if mask.shape is None or rank != RANK or scale != 1:
        return "a mask that depends on the input is scaled, or differs between windows"
    return replace(scores, others=(*scores.others, mask))


def _with_known(scores: _Scores, mask: Array) -> _Scores | str:
    total = mask if scores.known is None else add_masks(scores.known, mask)
    return "its masks do not fit each other" if total is None else replace(scores, known=total)


def _chosen_scores(node: ir.Node, scale: float) -> _Scores | str:
    """Where(mask, scores, fill) or Where(mask, fill, scores), fill so low that exp makes 0 of it."""
    condition, first, second = node.inputs
    out = node.outputs[0]
    mask = None if condition is None else known_mask(condition, len(out.shape or ()))
    if mask is None:
        return "its scores are chosen by a condition that depends on the input"
    for x, fill, kept in ((first, second, mask), (second, first, excluded(mask))):
        low = scalar(fill)
        if low is not None and scale > 0 and low * scale <= MASKED:
            found = _inner(x, out, scale)
            return found if isinstance(found, str) else _with_known(found, kept)
    return f"what is chosen instead of its scores is not below {MASKED:g}"


def _keeps_heads(before: ir.Value, after: ir.Value) -> bool:
    """Whether the last three axes, heads, queries and keys, are the same before and after."""
    if before.shape is None or after.shape is None:
        return False
    last = list(after.shape)[1 - RANK :]
    known = all(isinstance(dim, int) or dim.value is not None for dim in last)
    return known and len(after.shape) >= RANK and list(before.shape)[1 - RANK :] == last


def _keeps_shape(before: ir.Value, after: ir.Value) -> bool:
    """Whether an operand of an elementwise operator has the shape of its result, as far as that is known."""
    if before.shape is None or after.shape is None or len(before.shape) != len(after.shape):
        return False
    return all(a == b or a != 1 for a, b in zip(before.shape, after.shape, strict=True))


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """What is multiplied by constants, and their product."""
    assert value is not None
    node = value.producer()
    found = None if node is None or node.domain or node.op_type not in ("Mul", "Div") else _factor(node)
    if found is None or not _keeps_shape(found[0], value):
        return value, 1.0
    inner, scale = _unscaled(found[0])
    return inner, scale * found[1]


def _factor(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The other operand of a Mul by a constant or a Div by one, and the factor, which is not 0."""
    operands: Sequence[Sequence[ir.Value | None]] = [tuple(node.inputs)]
    if node.op_type == "Mul":
        operands = [*operands, tuple(node.inputs)[::-1]]
    for x, other in operands:
        factor = scalar(other)
        if x is not None and factor:
            return x, factor if node.op_type == "Mul" else 1 / factor
    return None
