from __future__ import annotations

import onnx_ir as ir
import pytest

from exporters.same_value import same_value


def first_two_of(nodes: str) -> tuple[ir.Value, ir.Value]:
    """The values a and b of a graph of these nodes, which read x."""
    model = ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["": 23]>
        g (float[2,3] x, float[2,3] z) => (float[2,3] y) <float c = {{2}}, float d = {{2}}, float e = {{3}}>
        {{ {nodes} y = Add(a, b) }}
    """)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    return by_name["a"], by_name["b"]


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Relu(x) b = Relu(x)",
        "r = Relu(x) a = Identity(r) b = Relu(x)",
        "a = Mul(x, c) b = Mul(x, d)",
        "s = Softmax<axis=1>(x) t = Softmax<axis=1>(x) a = Exp(s) b = Exp(t)",
        "o, b = Split<axis=0, num_outputs=2>(x) p, a = Split<axis=0, num_outputs=2>(x)",
    ],
    ids=["one node twice", "an identity", "equal constants", "chains", "outputs of one index"],
)
def test_equal_operators_on_equal_inputs_make_one_value(nodes: str) -> None:
    a, b = first_two_of(nodes)
    assert same_value(a, b)
    assert same_value(b, a)


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Relu(x) b = Relu(z)",
        "a = Relu(x) b = Exp(x)",
        "a = Mul(x, c) b = Mul(x, e)",
        "a = Softmax<axis=0>(x) b = Softmax<axis=1>(x)",
        "a, b = Split<axis=0, num_outputs=2>(x)",
        "a = RandomNormal<shape=[2,3]>() b = RandomNormal<shape=[2,3]>()",
    ],
    ids=["inputs", "operators", "constants", "attributes", "outputs", "random numbers"],
)
def test_values_that_differ_are_told_apart(nodes: str) -> None:
    assert not same_value(*first_two_of(nodes))


def test_what_is_missing_on_both_sides_is_the_same() -> None:
    a, b = first_two_of("a = Clip(x, , c) b = Clip(x, , d)")
    assert same_value(a, b)
    assert not same_value(a, None)
