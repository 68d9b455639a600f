from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.constant_view import ConstantView, view_of

Shape = tuple[int, ...]


def node(op_type: str, given_integers: list[int] | None = None, **attributes: int | list[int]) -> ir.Node:
    inputs = [ir.Value(name="x")]
    if given_integers is not None:
        integers = ir.tensor(np.array(given_integers, np.int64), name="integers")
        inputs.append(ir.Value(name="integers", const_value=integers))
    return ir.node(op_type, inputs, attributes=attributes)


def compute(step: ir.Node, values: np.ndarray[Shape, np.dtype[np.int64]]) -> np.ndarray[Shape, np.dtype[np.int64]]:
    """What ONNX says that the node makes of `values`."""
    output = step.outputs[0]
    output.name = "y"
    feeds = {"x": values}
    if len(step.inputs) > 1:
        assert step.inputs[1] is not None
        assert step.inputs[1].const_value is not None
        feeds["integers"] = step.inputs[1].const_value.numpy()
    moved: Any = ReferenceEvaluator(ir.to_proto(step)).run(None, feeds)
    return np.asarray(moved[0])


@st.composite
def steps(draw: st.DrawFn, shape: Shape) -> ir.Node:
    """Any node of those that may stand behind a constant of `shape`."""
    rank = len(shape)
    kind = draw(st.sampled_from(["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast"]))
    if kind == "Transpose":
        perm = draw(st.none() | st.permutations(range(rank)))
        return node(kind) if perm is None else node(kind, perm=list(perm))
    if kind == "Reshape":
        return node(kind, draw(targets(shape)))
    if kind == "Squeeze":
        ones = [axis - rank * draw(st.booleans()) for axis in range(rank) if shape[axis] == 1]
        return node(kind, draw(st.none() | st.just(ones)) if ones else None)
    if kind == "Unsqueeze":
        return node(kind, draw(st.lists(st.integers(0, rank), min_size=1, max_size=2, unique=True)))
    if kind == "Flatten":
        return node(kind, axis=draw(st.integers(-rank, rank)))
    return node(kind, to=int(ir.DataType.INT64))


@st.composite
def targets(draw: st.DrawFn, shape: Shape) -> list[int]:
    """What Reshape may be given: axes merged or split, one of them perhaps as −1, some perhaps as 0."""
    target = list(shape)
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, len(target) - 1))
        if draw(st.booleans()) and index + 1 < len(target):
            target[index : index + 2] = [target[index] * target[index + 1]]
        else:
            factor = draw(st.sampled_from([n for n in range(1, target[index] + 1) if target[index] % n == 0]))
            target[index : index + 1] = [factor, target[index] // factor]
    if draw(st.booleans()):
        target[draw(st.integers(0, len(target) - 1))] = -1
    elif target[0] == shape[0]:
        target[0] = 0
    return target


@given(st.data(), st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.integers(0, 4))
def test_follows_axes_as_onnx_moves_them(data: st.DataObject, lengths: list[int], count: int) -> None:
    """Each value is given its coordinates: along an axis that is the k-th stored one, the k-th of them counts up."""
    stored = tuple(lengths)
    coordinates, passed = list(np.indices(stored)), []
    for _ in range(count):
        step = data.draw(steps(coordinates[0].shape))
        passed.append(step)
        coordinates = [compute(step, moved) for moved in coordinates]
    view = view_of(stored, passed)
    assert view is not None
    assert view.shape == coordinates[0].shape
    for axis, kept in enumerate(view.axes):
        counts_up = np.indices(view.shape)[axis]
        if kept is not None:
            assert np.array_equal(coordinates[kept], counts_up)
            assert stored[kept] == view.shape[axis]
        elif count == 1 and view.shape[axis] > 1:  # split and merged again later it would be an axis, but none is lost
            assert not any(np.array_equal(moved, counts_up) for moved in coordinates)


def test_what_moves_nothing_changes_nothing() -> None:
    passed = [node("DequantizeLinear"), node("Cast", to=10), node("Identity")]
    assert view_of((4, 6), passed) == view_of((4, 6), []) == ConstantView((4, 6), (0, 1))


@pytest.mark.parametrize(
    "step",
    [
        node("Transpose", perm=[0, 0]),
        node("Transpose", perm=[0, 1, 2]),
        node("Reshape"),
        node("Reshape", [5, 5]),
        node("Reshape", [0, 0, 0]),
        node("Reshape", [-1, 5]),
        node("Unsqueeze"),
        node("Squeeze", [0]),
    ],
    ids=[
        "one axis twice",
        "too many axes",
        "no shape",
        "another size",
        "too many zeros",
        "no divisor",
        "no axes",
        "an axis longer than 1",
    ],
)
def test_an_unsound_node_has_no_view(step: ir.Node) -> None:
    assert view_of((4, 6), [step]) is None


def test_zero_is_a_length_where_it_is_said_to_be() -> None:
    assert view_of((4, 0), [node("Reshape", [0, 4], allowzero=1)]) == ConstantView((0, 4), (None, None))
    assert prod((4, 0)) == 0
