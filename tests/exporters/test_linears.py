from __future__ import annotations

import onnx_ir as ir
import pytest

from exporters.linears import array_shape, find_linears, scale_of, trace_back
from exporters.module_names import MODULE_KEY

FLOAT_LAYERS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,3] y)
    <float[4,2] w1 = {1, 2, 3, 4, 5, 6, 7, 8}, float[3,2] w2 = {1, 2, 3, 4, 5, 6}>
    {
        [first] t = MatMul(x, w1)
        [second] y = Gemm<transB=1>(t, w2)
    }
"""
QUANTIZED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.25}, int8 z = {0}, float[2] ws = {0.5, 0.125}, int8[2] wz = {0, 0},
     int8[4,2] w = {1, 0, 0, 2, 3, 0, 0, -4}>
    {
        [wide] xf = Cast<to=1>(x)
        [q] xq = QuantizeLinear(xf, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [narrow] xh = Cast<to=1>(xd)
        [w_dq] wd = DequantizeLinear<axis=1>(w, ws, wz)
        [w_narrow] wh = Cast<to=1>(wd)
        [fc] y = MatMul(xh, wh)
    }
"""


def test_finds_matmul_and_gemm_in_the_order_of_the_graph() -> None:
    first, second = find_linears(ir.from_onnx_text(FLOAT_LAYERS).graph)
    assert (first.node.name, first.k_axis, first.k, first.n) == ("first", 0, 4, 2)
    assert (second.node.name, second.k_axis, second.k, second.n) == ("second", 1, 2, 3)


def test_a_float_layer_has_no_scales() -> None:
    linear = next(find_linears(ir.from_onnx_text(FLOAT_LAYERS).graph))
    assert (linear.weight_dq, linear.input_q, linear.weight_scale, linear.input_scale) == (None, None, None, None)
    assert (linear.weight_type, linear.activation_type) == ("float32", "float32")


def test_an_activation_of_no_declared_type_is_unknown() -> None:
    _, second = find_linears(ir.from_onnx_text(FLOAT_LAYERS).graph)
    assert second.activation_type == "unknown"


def test_looks_through_qdq_and_casts() -> None:
    (linear,) = find_linears(ir.from_onnx_text(QUANTIZED).graph)
    assert (linear.weight_type, linear.activation_type) == ("int8", "int8")
    assert linear.values.tolist() == [[1, 0], [0, 2], [3, 0], [0, -4]]
    assert linear.input_scale == 0.25
    assert linear.weight_scale is not None
    assert linear.weight_scale.tolist() == [0.5, 0.125]


@pytest.mark.parametrize(
    "node",
    ["MatMul(x, x)", "MatMul(w, x)", "MatMul(x, stack)", "com.microsoft.MatMul(x, w)", "Add(x, w)"],
    ids=["two activations", "constant first", "3-D constant", "other domain", "other operator"],
)
def test_is_not_a_linear_layer(node: str) -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
        g (float[2,2] x) => (float[2,2] y)
        <float[2,2] w = {{1, 2, 3, 4}}, float[1,2,2] stack = {{1, 2, 3, 4}}>
        {{ y = {node} }}
    """)
    assert list(find_linears(model.graph)) == []


def test_is_named_after_its_module_or_else_its_node() -> None:
    model = ir.from_onnx_text(FLOAT_LAYERS)
    model.graph[0].metadata_props[MODULE_KEY] = "blocks.0.fc"
    assert [linear.module for linear in find_linears(model.graph)] == ["blocks.0.fc", "second"]


def test_trace_back_returns_the_source_and_the_nodes_passed() -> None:
    model = ir.from_onnx_text(QUANTIZED)
    source, passed = trace_back(model.graph[-1].inputs[0])
    assert source is model.graph.inputs[0]
    assert [node.name for node in passed] == ["narrow", "dq", "q", "wide"]
    assert trace_back(None) == (None, [])


def test_scale_behind_a_cast() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["": 23]>
        g (float16[N] x) => (int8[N] y)
        <float s = {0.5}, int8 z = {0}>
        {
            [cast] h = Cast<to=10>(s)
            [q] y = QuantizeLinear(x, h, z)
        }
    """)
    assert scale_of(model.graph[1]) == 0.5


def test_shape_of_a_constant() -> None:
    held = ir.from_onnx_text(FLOAT_LAYERS).graph.initializers
    assert [array_shape(value) for value in held.values()] == [(4, 2), (3, 2)]
