"""Integers of a graph that can be told without running it: sizes, and what is computed of them.

    Shape(x), x [batch, 257, 384]                             →  (batch, 257, 384)
    Concat(Unsqueeze(Gather(Shape(x), 0)), [−1, 6, 64])       →  (batch, −1, 6, 64)

An element is an int, or the name of a size that is known only at run time. A sum or a product of such names is a
formula, as in the shapes that exporters write; anything else that is computed of them gets a name of its own.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.qdq_scales import constant_of

Size = int | str
Sizes = npt.NDArray[np.object_]
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
_MOST = 64  # elements: no shape is longer


class KnownSizes:
    """What is known of the integer tensors of one graph, asked node by node in the graph's order."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Sizes] = {}
        self._numbers = itertools.count()

    def of(self, value: ir.Value | None) -> Sizes | None:
        """The elements of a constant or of what `learn` has seen; None where they are not known."""
        if value is None or value in self._known:
            return None if value is None else self._known[value]
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or value.is_graph_input() or tensor.dtype not in _INTEGERS or tensor.size > _MOST:
            return None
        array = constant_of(value)
        return None if array is None else array.astype(np.int64).astype(object)

    def learn(self, node: ir.Node) -> None:
        """Compute what `node` makes of sizes that are known."""
        rule = _RULES.get(node.op_type) if not node.domain else None
        found = None if rule is None or len(node.outputs) != 1 else rule(self, node)
        if found is not None and found.size <= _MOST:
            self._known[node.outputs[0]] = found

    def dims(self, value: ir.Value | None) -> list[Size] | None:
        """The sizes of a tensor; a nameless one gets a name, and a formula has its terms in one order."""
        if value is None or value.shape is None:
            return None
        return [dim if isinstance(dim, int) else _name(dim) or self.unknown() for dim in value.shape]

    def unknown(self) -> str:
        """A name that nothing else has."""
        return f"?{next(self._numbers)}"

    def inputs(self, node: ir.Node) -> list[Sizes] | None:
        """The elements of all inputs; None where one is not known."""
        found = [self.of(value) for value in node.inputs]
        return None if any(sizes is None for sizes in found) else [sizes for sizes in found if sizes is not None]


def remaining(dims: Sequence[Size], others: Sequence[Size]) -> Size | None:
    """The size that −1 stands for: the product of `dims` over that of `others`; None where it is no int and no name."""
    whole, part = (math.prod(size for size in sizes if isinstance(size, int)) for sizes in (dims, others))
    names = Counter(size for size in dims if isinstance(size, str))
    names.subtract(size for size in others if isinstance(size, str))
    left = [(name, count) for name, count in names.items() if count]
    if not part or whole % part:
        return None
    if not left:
        return whole // part
    return left[0][0] if whole == part and left == [(left[0][0], 1)] else None


def _name(dim: ir.SymbolicDim) -> str | None:
    """The name of a size: `past + new` where exporters wrote `new + past`."""
    if dim.value is None or dim.value.isidentifier():
        return dim.value
    try:
        return (dim + 0).value
    except ValueError:  # no formula
        return dim.value


def _shape(known: KnownSizes, node: ir.Node) -> Sizes | None:
    dims = known.dims(node.inputs[0])
    if dims is None:
        return None
    end = node.attributes.get_int("end", len(dims))
    return _array(dims[node.attributes.get_int("start", 0) : end])


def _gather(known: KnownSizes, node: ir.Node) -> Sizes | None:
    found = known.inputs(node)
    if found is None or found[0].ndim != 1 or not _is_int(found[1]):
        return None
    return np.asarray(found[0][found[1].astype(np.int64)], object)


def _slice(known: KnownSizes, node: ir.Node) -> Sizes | None:
    found = known.inputs(node)
    if found is None or found[0].ndim != 1 or not all(_is_int(bound) for bound in found[1:]):
        return None
    step = found[4].item() if len(found) > 4 else 1
    return np.asarray(found[0][slice(found[1].item(), found[2].item(), step)]) if step > 0 else None


def _concat(known: KnownSizes, node: ir.Node) -> Sizes | None:
    found = known.inputs(node)
    return None if found is None or any(part.ndim != 1 for part in found) else np.concatenate(found)


def _reshaped(known: KnownSizes, node: ir.Node) -> Sizes | None:
    """Unsqueeze, Squeeze and Reshape between a scalar and one axis keep the elements in their order."""
    found, shape = known.of(node.inputs[0]), node.outputs[0].shape
    if found is None or shape is None or len(shape) > 1:
        return None
    return found.reshape(()) if len(shape) == 0 and found.size == 1 else found.reshape(-1)


def _same(known: KnownSizes, node: ir.Node) -> Sizes | None:
    kept = node.outputs[0].dtype in _INTEGERS
    return known.of(node.inputs[0]) if kept else None


def _constant_of_shape(known: KnownSizes, node: ir.Node) -> Sizes | None:
    shape, value = known.of(node.inputs[0]), node.attributes.get("value")
    if shape is None or not _is_int(shape) or value is None or value.as_tensor().dtype not in _INTEGERS:
        return None
    sizes = tuple(shape.tolist())
    return np.full(sizes, int(value.as_tensor().numpy().item()), object) if math.prod(sizes) <= _MOST else None


def _where(known: KnownSizes, node: ir.Node) -> Sizes | None:
    found = known.inputs(node)
    return None if found is None or not _is_int(found[0]) else np.where(found[0].astype(bool), found[1], found[2])


def _elementwise(compute: Callable[[Size, Size], Size | None]) -> Callable[[KnownSizes, ir.Node], Sizes | None]:
    def rule(known: KnownSizes, node: ir.Node) -> Sizes | None:
        found = known.inputs(node)
        if found is None or node.outputs[0].dtype not in _INTEGERS:
            return None
        left, right = np.broadcast_arrays(*found)
        pairs = zip(left.ravel(), right.ravel(), strict=True)
        results = [known.unknown() if (result := compute(a, b)) is None else result for a, b in pairs]
        return _array(results).reshape(left.shape)

    return rule


def _arithmetic(compute: Callable[[int, int], int | None], neutral: int) -> Callable[[Size, Size], Size | None]:
    def rule(a: Size, b: Size) -> Size | None:
        if isinstance(a, int) and isinstance(b, int):
            return compute(a, b)
        return a if b == neutral else _formula(compute, a, b)

    return rule


def _formula(compute: Callable[[Any, Any], Any], a: Size, b: Size) -> str | None:
    """The name of a sum or a product, as exporters name such a size; None for what may be negative."""
    if compute not in (operator.add, operator.mul) or any(isinstance(size, int) and size < 0 for size in (a, b)):
        return None
    first, second = (size if isinstance(size, int) else ir.SymbolicDim(size) for size in (a, b))
    try:
        found: str | None = compute(first, second).value
    except ValueError:  # a name that is no formula
        return None
    return found


def _divide(a: int, b: int) -> int | None:
    """As ONNX divides integers: towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else None


def _equal(a: Size, b: Size) -> Size | None:
    if isinstance(a, str) != isinstance(b, str):
        return 0 if min(x for x in (a, b) if isinstance(x, int)) < 0 else None  # a size is never negative
    return int(a == b) if isinstance(a, int) or a == b else None


def _is_int(sizes: Sizes) -> bool:
    return all(isinstance(size, int) for size in sizes.ravel())


def _array(sizes: Sequence[Any]) -> Sizes:
    array = np.empty(len(sizes), object)
    array[:] = list(sizes)
    return array


_RULES: dict[str, Callable[[KnownSizes, ir.Node], Sizes | None]] = {
    "Shape": _shape,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _reshaped,
    "Squeeze": _reshaped,
    "Reshape": _reshaped,
    "Identity": _same,
    "Cast": _same,
    "ConstantOfShape": _constant_of_shape,
    "Where": _where,
    "Add": _elementwise(_arithmetic(operator.add, 0)),
    "Sub": _elementwise(_arithmetic(operator.sub, 0)),
    "Mul": _elementwise(_arithmetic(operator.mul, 1)),
    "Div": _elementwise(_arithmetic(_divide, 1)),
    "Equal": _elementwise(_equal),
}
