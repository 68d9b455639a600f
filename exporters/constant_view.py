"""How a node sees a stored constant: its shape there, and which stored axis each of its axes is.

    w [768, 3072] ─► Transpose<perm=[1, 0]> ─► Unsqueeze<0> ─► MatMul       shape [1, 3072, 768], axes (None, 1, 0)
    w [64, 9]     ─► Reshape [64, 1, 3, 3]  ─► Conv                         shape [64, 1, 3, 3], axes (0, None…)

A reshape keeps an axis if the axis has the same length and the same number of values before it: then it also has the
same stride, so consecutive values along it stay consecutive. Only shapes are read, never the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ConstantView:
    """A constant as a node sees it.

    Attributes:
        shape: its shape there.
        axes: for each axis of `shape` the stored axis that it is; None where it is none of them.
    """

    shape: Shape
    axes: tuple[int | None, ...]


def view_of(stored: Shape, passed: Sequence[ir.Node]) -> ConstantView | None:
    """Return what the last of `passed` makes of a constant of shape `stored`; None where its shape is not known.

    Args:
        stored: the constant's shape.
        passed: the nodes from the constant to its reader, in this order; those that move nothing change nothing.
    """
    view = ConstantView(stored, tuple(range(len(stored))))
    for node in passed:
        moved = _moved(node, view)
        if moved is None:
            return None
        view = moved
    return view


def _moved(node: ir.Node, view: ConstantView) -> ConstantView | None:
    if node.op_type == "Transpose":
        rank = len(view.shape)
        perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
        if sorted(perm) != list(range(rank)):
            return None
        return ConstantView(tuple(view.shape[axis] for axis in perm), tuple(view.axes[axis] for axis in perm))
    if node.op_type not in RESHAPES:
        return view
    shape = _reshaped(node, view.shape)
    if shape is None or prod(shape) != prod(view.shape):
        return None
    return ConstantView(shape, tuple(_axis_before(view, shape, axis) for axis in range(len(shape))))


def _axis_before(view: ConstantView, shape: Shape, axis: int) -> int | None:
    """The stored axis of `shape[axis]`: that of the same length with as many values before it."""
    same = (
        kept
        for before, kept in enumerate(view.axes)
        if view.shape[before] == shape[axis] != 1 and prod(view.shape[:before]) == prod(shape[:axis])
    )
    return next(same, None)


def _reshaped(node: ir.Node, shape: Shape) -> Shape | None:
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1)
        axis = axis + len(shape) if axis < 0 else axis
        return prod(shape[:axis]), prod(shape[axis:])
    given = _integers(node)
    if node.op_type == "Squeeze":
        dropped = {axis % len(shape) for axis in given} if given else {i for i, n in enumerate(shape) if n == 1}
        return tuple(n for axis, n in enumerate(shape) if axis not in dropped)
    if given is None:
        return None
    if node.op_type == "Unsqueeze":
        rank = len(shape) + len(given)
        lengths, added = iter(shape), {axis % rank for axis in given}
        return tuple(1 if axis in added else next(lengths, 0) for axis in range(rank))
    return _targeted(given, shape, allow_zero=bool(node.attributes.get_int("allowzero", 0)))


def _targeted(target: Shape, shape: Shape, *, allow_zero: bool) -> Shape | None:
    """The shape that Reshape makes for `target`: 0 keeps a length, −1 takes what is left."""
    if not allow_zero and any(length == 0 for length in target[len(shape) :]):
        return None
    kept = tuple(shape[axis] if length == 0 and not allow_zero else length for axis, length in enumerate(target))
    known = prod(length for length in kept if length != -1)
    return tuple(prod(shape) // max(known, 1) if length == -1 else length for length in kept)


def _integers(node: ir.Node) -> Shape | None:
    """The axes or the shape that a node is given, as an attribute (Squeeze before opset 13) or as a constant."""
    if "axes" in node.attributes:
        return tuple(node.attributes.get_ints("axes", ()))
    value = node.inputs[1] if len(node.inputs) > 1 else None
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else tuple(int(length) for length in constant.numpy().ravel())
