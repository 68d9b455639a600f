from __future__ import annotations

import onnx_ir as ir
import pytest

from exporters.attentions import find_attentions

GRAPH = """<ir_version: 11, opset_import: ["": 23]>
    g (float[N,4,4] x, float[N,4,4] v) => (float[A,B,C] y)
    <float s = {{0.5}}, int8 z = {{0}}, float zero = {{0}}, float[1,2] w = {{1, 2}}, int64[3] shape = {{-1, 4, 4}}> {{
        [soft] p = Softmax(x)
        {then}
    }}"""


def found(then: str) -> list[str | None]:
    return [node.name for node in find_attentions(ir.from_onnx_text(GRAPH.format(then=then)).graph)]


@pytest.mark.parametrize(
    "then",
    [
        "y = MatMul(p, v)",
        "h = Cast<to=10>(p) f = Cast<to=1>(h) y = MatMul(f, v)",
        "q = QuantizeLinear(p, s, z) d = DequantizeLinear(q, s, z) y = MatMul(d, v)",
        "n = IsNaN(p) g = Where(n, zero, p) y = MatMul(g, v)",
        "r = Reshape(p, shape) t = Transpose<perm=[0,1,2]>(r) y = MatMul(t, v)",
        'y = Einsum<equation="bij,bjk->bik">(p, v)',
        "k = Identity(p) spare = ReduceMax(p) y = MatMul(k, v)",
    ],
    ids=["plain", "cast", "Q/DQ", "NaN guard", "reshape", "Einsum", "read twice"],
)
def test_finds_weights_that_multiply_values(then: str) -> None:
    assert found(then) == ["soft"]


@pytest.mark.parametrize(
    "then",
    [
        "y = Identity(p)",
        "y = MatMul(p, w)",
        "t = Identity(w) y = MatMul(p, t)",
        "y = MatMul(v, p)",
        "a = Relu(p) y = MatMul(a, v)",
    ],
    ids=["output", "a constant", "a constant behind a node", "second operand", "something else"],
)
def test_a_head_is_no_attention(then: str) -> None:
    assert found(then) == []


def test_finds_the_operator() -> None:
    header = '<ir_version: 11, opset_import: ["": 23]> g (float[N,2,4,4] q) => (float[N,2,4,4] y)'
    text = header + "{[a] y = Attention(q, q, q)}"
    assert [node.name for node in find_attentions(ir.from_onnx_text(text).graph)] == ["a"]


def test_a_contrib_operator_of_the_same_name_is_none() -> None:
    text = (
        '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]> g (float[N,4,4] q) => (float[N,4,4] y) '
        "{[a] y = com.microsoft.Attention(q, q, q)}"
    )
    assert list(find_attentions(ir.from_onnx_text(text).graph)) == []
