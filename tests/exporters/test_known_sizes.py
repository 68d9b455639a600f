from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.known_sizes import KnownSizes, Size, remaining

TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[batch,3,8] x) => (int64[n] y)
    <int64 one = {{1}}, int64 zero = {{0}}, int64[1] axis = {{0}}, int64[1] first = {{1}}, int64[1] end = {{9}},
     int64[1] minus = {{-1}}, int64[2] rest = {{-1, 4}}, int64[3] others = {{-1, 2, 8}}, int64[1] three = {{3}}>
    {{
        s = Shape(x)
        {nodes}
    }}
"""
KNOWN: dict[str, list[Size]] = {
    "y = Identity(s)": ["batch", 3, 8],
    "y = Slice(s, first, end)": [3, 8],
    "y = Slice(s, minus, end, axis)": [8],
    "g = Gather(s, zero) u = Unsqueeze(g, axis) y = Concat<axis=0>(u, rest)": ["batch", -1, 4],
    "y = Gather(s, axis)": ["batch"],
    "y = Mul(s, first)": ["batch", 3, 8],
    "y = Add(s, axis)": ["batch", 3, 8],
    "y = Concat<axis=0>(s, s)": ["batch", 3, 8, "batch", 3, 8],
    "g = Gather(s, one) m = Mul(g, g) u = Unsqueeze(m, axis) y = Div(u, rest)": [-9, 2],
    "e = Equal(s, minus) y = Where(e, others, s)": ["batch", 3, 8],
    "e = Equal(s, s) y = Where(e, others, s)": [-1, 2, 8],
    "y = ConstantOfShape<value = int64[1] {7}>(three)": [7, 7, 7],
    "c = Cast<to=6>(s) y = Cast<to=7>(c)": ["batch", 3, 8],
}


def known(nodes: str) -> tuple[KnownSizes, ir.Value]:
    proto = onnx.parser.parse_model(TEXT.format(nodes=nodes))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    sizes = KnownSizes()
    for node in model.graph:
        sizes.learn(node)
    return sizes, model.graph.outputs[0]


@pytest.mark.parametrize(("nodes", "expected"), KNOWN.items())
def test_tells_what_is_computed_of_a_shape(nodes: str, expected: list[Size]) -> None:
    sizes, output = known(nodes)
    found = sizes.of(output)
    assert found is not None
    assert found.tolist() == expected


@pytest.mark.parametrize("nodes", KNOWN)
@pytest.mark.parametrize("batch", [1, 5])
def test_agrees_with_onnx_at_any_batch(nodes: str, batch: int) -> None:
    sizes, output = known(nodes)
    told = sizes.of(output)
    assert told is not None
    model = onnx.parser.parse_model(TEXT.format(nodes=nodes))
    (computed,) = ReferenceEvaluator(model).run(None, {"x": np.zeros((batch, 3, 8), np.float32)})
    assert [batch if size == "batch" else size for size in told.tolist()] == np.asarray(computed).tolist()


@pytest.mark.parametrize(
    "nodes", ["y = Add(s, first)", "y = Mul(s, s)", "y = Div(s, three)", "y = Sub(first, s)", "y = Div(s, axis)"]
)
def test_what_is_computed_of_an_open_size_has_a_name_of_its_own(nodes: str) -> None:
    sizes, output = known(nodes)
    found = sizes.of(output)
    assert found is not None
    assert isinstance(found[0], str)
    assert found[0] != "batch"


def test_an_open_size_may_be_any_number_but_a_negative_one() -> None:
    sizes, output = known("e = Equal(s, three) y = Where(e, others, s)")
    assert sizes.of(output) is None


@pytest.mark.parametrize(
    ("dims", "others", "left"),
    [
        (["n", 4, 6], ["n", 3], 8),
        (["n", 4, 6], [4, 6], "n"),
        (["n", 4, 6], [24], "n"),
        (["n", "m", 6], ["m", 6], "n"),
        (["n", "m"], [], None),
        (["n", 6], [3], None),
        (["n", 6], ["m"], None),
        ([4, 6], [5], None),
        ([4, 0], [0], None),
    ],
)
def test_tells_what_remains_for_one_axis(dims: list[Size], others: list[Size], left: Size | None) -> None:
    assert remaining(dims, others) == left


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 7))
def test_what_remains_makes_the_product_whole(others: list[int], left: int) -> None:
    assert remaining([*others, left], others) == left
    assert remaining(["n", *others, left], ["n", *others]) == left
