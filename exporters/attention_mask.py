"""What an attention adds to its scores, where the graph tells it: position biases, window masks, padding that is none.

Exporters build masks of constants, and stretch them over a batch whose size they do not know:

    bias [1, heads, N, M] + Reshape(Expand(windows [1, W, 1, N, M], [batch, W, 1, N, M]), [-1, 1, N, M])

`known_mask` computes such a tree into one array [period, heads or 1, N, M]: entry b of the batch reads b modulo period.
What is masked is −∞ there, and becomes LOWEST where it is stored. That is the same for a query which may attend to
anything, since exp(LOWEST) is 0 beside it. One that may attend to nothing has no defined answer: NaN, the mean of v
or 0, as the source wrote its mask. `masks_a_query` tells it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[np.float32]
# exp(-30000) is 0 in every type, so nothing lower is needed; float16 holds it.
LOWEST = np.float32(-30000.0)
# What is masked, and far enough above LOWEST that a stored mask still tells such scores from it.
MASKED = np.float32(-10000.0)
RANK = 4
_LIMIT = 1 << 26  # elements of a mask that is worth computing


def known_mask(value: ir.Value, rank: int = RANK) -> Array | None:
    """Return the additive mask that `value` is for every input; None if it depends on one.

    Args:
        value: what is added to the scores, or a boolean, true where a key takes part.
        rank: axes of the scores there: 5 for [batch, windows, heads, N, M], 4 for [batch, heads, N, M] and 3 for
            [batch · heads, N, M].

    Returns:
        float32 [period, heads or 1, N or 1, M or 1], as exact as the constants, −∞ where a boolean is false.
    """
    found = _known(value)
    if found is None or found.ndim > rank or 0 in found.shape:
        return None
    found = _with_rank(found, max(rank, RANK))
    if rank == RANK:
        return found
    if len(found) != 1:
        return None
    return found[0] if rank > RANK else found.swapaxes(0, 1)


def is_neutral(mask: Array) -> bool:
    """Whether it adds the same to all scores of each query, which softmax does not see."""
    return bool((mask == mask[..., :1]).all())


def masks_a_query(mask: Array) -> bool:
    """Whether it leaves some query no key, or says NaN or +∞."""
    best = mask.max(axis=-1)
    return not bool(((best > MASKED) & (best < np.inf)).all())


def storable(mask: Array) -> Array:
    """The mask with nothing below LOWEST."""
    return np.maximum(mask, LOWEST)


def excluded(mask: Array) -> Array:
    """The mask of the keys that `mask`, a boolean one, lets take part."""
    return np.where(mask == 0, -np.inf, 0).astype(np.float32)


def scaled(mask: Array, factor: float) -> Array:
    """The mask times `factor`."""
    with np.errstate(over="ignore"):
        return mask * np.float32(factor)


def add_masks(first: Array, second: Array) -> Array | None:
    """The sum of two masks, their periods brought to one; None where they do not fit."""
    period = math.lcm(len(first), len(second))
    try:
        shape = np.broadcast_shapes((period, *first.shape[1:]), (period, *second.shape[1:]))
    except ValueError:
        return None
    if math.prod(shape) > _LIMIT:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return _repeated(first, period) + _repeated(second, period)


def _repeated(mask: Array, period: int) -> Array:
    return mask if len(mask) == 1 else np.tile(mask, (period // len(mask), 1, 1, 1))


def _known(value: ir.Value) -> Array | None:
    """The mask with the axes that it has in the graph, or RANK of them; the first of four is the batch's period."""
    constant = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if constant is not None:
        return _additive(constant.numpy()) if constant.size <= _LIMIT else None
    node = value.producer()
    rule = None if node is None or node.domain else _RULES.get(node.op_type)
    return None if node is None or rule is None else rule(node)


def _additive(array: npt.NDArray[np.generic]) -> Array:
    if array.dtype == np.bool_:
        return np.where(array, 0, -np.inf).astype(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _with_rank(array: Array, rank: int) -> Array:
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def _expand(node: ir.Node) -> Array | None:
    """An Expand that only repeats along the batch, or along axes that broadcast all the same."""
    x = _of_input(node, 0)
    shape = node.outputs[0].shape
    if x is None or shape is None or len(shape) < x.ndim:
        return None
    x = _with_rank(x, len(shape))
    return x if all(length in (1, dim) for length, dim in zip(x.shape, shape, strict=True)) else None


def _reshape(node: ir.Node) -> Array | None:
    """[1, W, h, N, M], repeated along the batch, to [batch · W, h, N, M]."""
    x = _of_input(node, 0)
    before, after = (None if value is None else value.shape for value in (node.inputs[0], node.outputs[0]))
    if x is None or before is None or after is None or (len(before), len(after), x.ndim) != (RANK + 1, RANK, RANK + 1):
        return None
    return x[0] if len(x) == 1 and list(before)[2:] == list(after)[1:] else None


def _add(node: ir.Node) -> Array | None:
    first = _of_input(node, 0)
    second = None if first is None else _of_input(node, 1)
    if first is None or second is None or max(first.ndim, second.ndim) > RANK:
        return None
    return add_masks(_with_rank(first, RANK), _with_rank(second, RANK))


def _cast(node: ir.Node) -> Array | None:
    """A Cast between types of numbers, or of a boolean to itself: true is no 1 to be added."""
    source = None if node.inputs[0] is None else node.inputs[0].dtype
    target = ir.DataType(node.attributes.get_int("to", 0))
    same = source is not None and (source == target or (source != ir.DataType.BOOL and target.is_floating_point()))
    return _of_input(node, 0) if same else None


def _same(node: ir.Node) -> Array | None:
    return _of_input(node, 0)


def _of_input(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index]
    return None if value is None else _known(value)


_RULES: Mapping[str, Callable[[ir.Node], Array | None]] = {
    "Add": _add, "Cast": _cast, "Expand": _expand, "Identity": _same, "Reshape": _reshape,
}  # fmt: skip
