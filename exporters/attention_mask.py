"""What an attention adds to its scores, where the graph tells it: position biases, window masks, padding that is none.

Exporters build masks of constants, and stretch them over a batch whose size they do not know:

    bias [1, heads, N, M] + Reshape(Expand(windows [1, W, 1, N, M], [batch, W, 1, N, M]), [-1, 1, N, M])

`known_mask` computes such a tree into one array [period, heads or 1, N, M]: entry b of the batch reads b modulo period.
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
RANK = 4
_LIMIT = 1 << 26  # elements of a mask that is worth computing


def known_mask(value: ir.Value) -> Array | None:
    """Return the additive mask that `value` is for every input, float32 [period, heads or 1, N, M]; None if none is."""
    found = _known(value)
    return None if found is None or found.ndim != RANK else found


def is_neutral(mask: Array) -> bool:
    """Whether it adds the same to all scores of each query, which softmax does not see."""
    return bool((mask == mask[..., :1]).all())


def additive(array: npt.NDArray[np.generic]) -> Array:
    """A mask as what it adds: 0 and LOWEST for a boolean one, the values but nothing below LOWEST for a float one."""
    if array.dtype == np.bool_:
        return np.where(array, np.float32(0), LOWEST)
    return np.maximum(array.astype(np.float32), LOWEST)


def add_masks(first: Array, second: Array) -> Array | None:
    """The sum of two masks, their periods brought to one; None where they do not fit."""
    period = math.lcm(len(first), len(second))
    try:
        total = np.tile(first, (period // len(first), 1, 1, 1)) + np.tile(second, (period // len(second), 1, 1, 1))
    except ValueError:
        return None
    return np.maximum(total, LOWEST)


def _known(value: ir.Value) -> Array | None:
    """The mask with the rank that it has in the graph, its leading axis the batch's period."""
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return additive(_at_least_4d(constant.numpy())) if constant.size <= _LIMIT else None
    node = value.producer()
    if node is None or node.domain or node.op_type not in _RULES or node.inputs[0] is None:
        return None
    return _RULES[node.op_type](node)


def _at_least_4d(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return array.reshape((1,) * (RANK - array.ndim) + array.shape)


def _expand(node: ir.Node) -> Array | None:
    """An Expand that only repeats along the batch, or along axes that broadcast all the same."""
    x = _of_input(node, 0)
    shape = node.outputs[0].shape
    if x is None or shape is None or len(shape) != x.ndim:
        return None
    same = all(length in (1, dim) for length, dim in zip(x.shape[1:], shape[1:], strict=True))
    return x if same and len(x) == 1 else None


def _reshape(node: ir.Node) -> Array | None:
    """[1, W, h, N, M], repeated along the batch, to [batch · W, h, N, M]."""
    x = _of_input(node, 0)
    shape = node.outputs[0].shape
    if x is None or shape is None or len(shape) != RANK or x.ndim != RANK + 1 or len(x) != 1:
        return None
    same = all(length in (1, dim) for length, dim in zip(x.shape[2:], shape[1:], strict=True))
    return x[0] if same else None


def _add(node: ir.Node) -> Array | None:
    first, second = _of_input(node, 0), _of_input(node, 1)
    if first is None or second is None or {first.ndim, second.ndim} != {RANK}:
        return None
    return add_masks(first, second)


def _same(node: ir.Node) -> Array | None:
    return _of_input(node, 0)


def _of_input(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index]
    return None if value is None else _known(value)


_RULES: Mapping[str, Callable[[ir.Node], Array | None]] = {
    "Add": _add, "Cast": _same, "Expand": _expand, "Identity": _same, "Reshape": _reshape,
}  # fmt: skip
