from __future__ import annotations

import onnx_ir as ir
import pytest

from exporters.infer_shape import infer_shape

HEADER = '<ir_version: 8, opset_import: ["": 17, "com.example": 1]>'


def inferred(nodes: str, values: str = "") -> ir.Value:
    model = ir.from_onnx_text(f"""
        {HEADER} g (float[batch,3,8] x, bool c) => (float[A,B,C] z)
        <float[8,5] w = {{{", ".join(["1"] * 40)}}}, int64[2] sizes = {{0, -1}}{values}>
        {{ {nodes} z = Relu(y) }}
    """)
    infer_shape(model.graph[0], 17)
    return model.graph[0].outputs[0]


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("y = MatMul(x, w)", ["batch", 3, 5]),
        ("y = Transpose<perm=[2,0,1]>(x)", [8, "batch", 3]),
        ("y = Reshape(x, sizes)", ["batch", 24]),
    ],
)
def test_tells_type_and_shape(node: str, shape: list[int | str]) -> None:
    value = inferred(node)
    assert value.dtype == ir.DataType.FLOAT
    assert value.shape == ir.Shape(shape)


@pytest.mark.parametrize(
    "node", ["y = com.example.Secret(x)", "y = Secret(x)", "y = MatMul(w, w)", "y = Range(c, c, c)"]
)
def test_leaves_what_it_has_no_rule_for(node: str) -> None:
    assert inferred(node).shape is None


def test_a_known_size_stays() -> None:
    assert inferred("y = Reshape(x, sizes)", ", float[7,24] y").shape == ir.Shape([7, 24])
