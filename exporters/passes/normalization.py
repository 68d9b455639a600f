"""What normalizations are made of: means over the last axes, and the division by the root of one.

v / √(mean(v²) + ε)      v = x for RMS normalization, v = x − mean(x) for layer normalization
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.linears import array_shape
from exporters.passes.inserter import Inserter
from exporters.passes.products import made_by, plus_any, product, scalar
from exporters.qdq_scales import constant_of, input_at


@dataclass(frozen=True)
class Mean:
    """The mean of `value` over `axes`, counted from the last (−1) on, which are kept with size 1."""

    value: ir.Value
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Normalized:
    """`value` divided by the root of its mean square over `axes` plus `epsilon`."""

    value: ir.Value
    axes: tuple[int, ...]
    epsilon: float


def normalized(node: ir.Node) -> Normalized | None:
    """What `node`, a Div or Mul, normalizes; None where it does not."""
    if node.domain or node.op_type not in ("Div", "Mul"):
        return None
    first, second = node.inputs
    pairs = [(first, second)] if node.op_type == "Div" else [(first, second), (second, first)]
    for value, by in pairs:
        inside = _root(by) if node.op_type == "Div" else inverse_root(by)
        found = None if value is None or inside is None else mean_square(value, inside)
        if found is not None:
            return found
    return None


def mean_of(value: ir.Value | None) -> Mean | None:
    """The mean that `value` is; None where it is none, or its axes are computed or not kept."""
    node = made_by(value, "ReduceMean")
    if node is None or node.inputs[0] is None or not node.attributes.get_int("keepdims", 1):
        return None
    given = constant_of(input_at(node, 1))
    axes = node.attributes.get_ints("axes", ()) if given is None else given.tolist()
    rank = 0 if node.inputs[0].shape is None else len(node.inputs[0].shape)
    return Mean(node.inputs[0], tuple(sorted(axis - rank if axis >= 0 else axis for axis in axes))) if axes else None


def sizes(x: ir.Value, axes: Sequence[int]) -> tuple[int, ...] | str:
    """The sizes of the last axes of x, where `axes` are these; else the reason why there are none."""
    if x.dtype is None or x.shape is None:
        return "the type or shape of its input is unknown"
    if list(axes) != list(range(-len(axes), 0)):
        return "its mean is not over the last axes"
    found = tuple(dim for dim in tuple(x.shape)[-len(axes) :] if isinstance(dim, int))
    return found if len(found) == len(axes) else "the sizes of its last axes are unknown"


def ones(inserter: Inserter, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """A scale that changes nothing."""
    name = f"ones_{dtype.name.lower()}_{'x'.join(map(str, shape))}"
    return inserter.initializer(name, np.ones(shape, dtype.numpy()))


def uncast(node: ir.Node, x: ir.Value) -> tuple[ir.Node, ir.Value]:
    """The Cast behind `node` and what x was cast from, where a normalization of x computes in float32 between casts.

    LayerNormalization and RMSNormalization do the same inside. Elsewhere `node` and x themselves.
    """
    before, behind = made_by(x, "Cast"), [user for user, _ in node.outputs[0].uses()]
    short = None if before is None else before.inputs[0]
    if short is None or x.dtype != ir.DataType.FLOAT or len(behind) != 1 or node.outputs[0].is_graph_output():
        return node, x
    (cast,) = behind
    same = cast.op_type == "Cast" and not cast.domain and cast.graph is node.graph
    shorter = short.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return (cast, short) if same and shorter and cast.outputs[0].dtype == short.dtype else (node, x)


def weighted(node: ir.Node, op_type: str, shape: tuple[int, ...]) -> tuple[ir.Node, ir.Value | None]:
    """The only reader of `node` and the constant of `shape` that it adds or multiplies; else `node` itself and None."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return node, None
    reader, index = uses[0]
    if reader.op_type != op_type or reader.domain or reader.graph is not node.graph:
        return node, None
    other = reader.inputs[1 - index]
    constant = other is not None and other.is_initializer() and not other.is_graph_input()
    if other is None or not constant or other.const_value is None or array_shape(other) != shape:
        return node, None
    return reader, other


def _root(value: ir.Value | None) -> ir.Value | None:
    """The y of `value` = √y."""
    if (node := made_by(value, "Sqrt")) is not None:
        return node.inputs[0]
    node = made_by(value, "Pow")
    return node.inputs[0] if node is not None and scalar(node.inputs[1]) == 0.5 else None


def inverse_root(value: ir.Value | None) -> ir.Value | None:
    """The y of `value` = 1 / √y."""
    if (node := made_by(value, "Reciprocal")) is not None:
        return _root(node.inputs[0])
    if (node := made_by(value, "Div")) is not None and scalar(node.inputs[0]) == 1:
        return _root(node.inputs[1])
    node = made_by(value, "Pow")
    return node.inputs[0] if node is not None and scalar(node.inputs[1]) == -0.5 else None


def mean_square(value: ir.Value, inside: ir.Value) -> Normalized | None:
    """`inside` as the mean of the square of `value` plus a constant."""
    shifted = plus_any(inside)
    mean = None if shifted is None else mean_of(shifted[0])
    if shifted is None or mean is None:
        return None
    square = product(mean.value)
    if square.constant != 1 or len(square.factors) != 2:
        return None
    same = all(_is_same(factor, value) for factor in square.factors)
    return Normalized(value, mean.axes, shifted[1]) if same else None


def _is_same(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values are equal: one and the same, or the same difference written twice."""
    if one is other:
        return True
    left, right = made_by(one, "Sub"), made_by(other, "Sub")
    return left is not None and right is not None and left.inputs == right.inputs
