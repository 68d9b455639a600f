from __future__ import annotations

from math import prod

import onnx_ir as ir
import pytest

from exporters.linears import Linear, array_shape, find_linears, find_untraced, scale_of, trace_back
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


def unread() -> ir.TensorProtocol:
    raise AssertionError("the values were read")


def with_weights(body: str, inputs: str = "float[N,4] x", opset: int = 23, **shapes: list[int]) -> ir.Model:
    """A graph whose weights have the given shapes; reading their values fails."""
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    model = ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]>
        g ({inputs}, {declared}) => (float[M,R] y)
        <int64[2] flat = {{6, -1}}, int64[2] swapped = {{0, 6}}, int64[4] patches = {{5, 8, 3, 3}},
         int64[4] pointwise = {{5, 8, 1, 1}}, int64[1] first = {{0}}, int64[2] both = {{2, 3}}>
        {{ {body} }}
    """)
    for value in [value for value in model.graph.inputs if value.name in shapes]:
        model.graph.inputs.remove(value)
        shape = ir.Shape(shapes[value.name or ""])
        value.const_value = ir.LazyTensor(unread, dtype=ir.DataType.FLOAT, shape=shape, name=value.name)
        model.graph.register_initializer(value)
    return model


def only(model: ir.Model) -> Linear:
    (linear,) = find_linears(model.graph)
    assert list(find_untraced(model.graph)) == []
    return linear


@pytest.mark.parametrize(
    ("node", "k_axis", "n_axis", "k", "n"),
    [
        ("MatMul(x, w)", 0, 1, 4, 6),
        ("MatMul(v, xt)", 1, 0, 4, 6),
        ("Gemm(x, w)", 0, 1, 4, 6),
        ("Gemm<transB=1>(x, v)", 1, 0, 4, 6),
        ("Gemm<transA=1, alpha=0.5, beta=2.0>(xt, w, b)", 0, 1, 4, 6),
        ("Gemm(v, xt)", 1, 0, 4, 6),
        ("Gemm<transA=1>(w, xt)", 0, 1, 4, 6),
        ("Gemm<transA=1, transB=1>(w, x)", 0, 1, 4, 6),
    ],
)
def test_a_gemm_has_its_weight_on_either_side(node: str, k_axis: int, n_axis: int, k: int, n: int) -> None:
    linear = only(with_weights(f"y = {node}", "float[N,4] x, float[4,N] xt", w=[4, 6], v=[6, 4], b=[6]))
    assert (linear.kind, linear.group) == ("gemm", 1)
    assert (linear.k_axis, linear.n_axis, linear.k, linear.n) == (k_axis, n_axis, k, n)
    activation = linear.node.inputs[linear.activation_input]
    assert activation is not None
    assert activation.name in ("x", "xt")


@pytest.mark.parametrize(
    ("node", "shape", "k_axis", "k", "n", "group"),
    [
        ("Conv(image, w)", [5, 8, 3, 3], 1, 72, 5, 1),
        ("Conv<group=2>(image, w)", [6, 4, 3, 3], 1, 36, 6, 2),
        ("Conv<group=8>(image, w)", [8, 1, 3, 3], 1, 9, 8, 8),
        ("ConvTranspose(image, w)", [8, 5, 3, 3], 0, 72, 5, 1),
        ("ConvTranspose<group=2>(image, w)", [8, 5, 3, 3], 0, 36, 10, 2),
    ],
)
def test_a_convolution_is_a_gemm_over_its_patches(
    node: str, shape: list[int], k_axis: int, k: int, n: int, group: int
) -> None:
    linear = only(with_weights(f"y = {node}", "float[1,8,9,9] image", w=shape))
    assert (linear.kind, linear.k_axis, linear.n_axis, linear.group) == ("conv", k_axis, 1 - k_axis, group)
    assert (linear.k, linear.n) == (k, n)
    assert linear.k * linear.n == prod(shape)


def test_a_convolution_of_one_dimension() -> None:
    linear = only(with_weights("y = Conv(x, w)", "float[1,8,9] x", w=[5, 8, 3]))
    assert (linear.kind, linear.k_axis, linear.k, linear.n) == ("conv", 1, 24, 5)


@pytest.mark.parametrize(
    ("chain", "shape", "k_axis", "n_axis"),
    [
        ("t = Transpose<perm=[1,0]>(w)", [6, 4], 1, 0),
        ("t = Transpose(w)", [6, 4], 1, 0),
        ("c = Cast<to=1>(w) i = Identity(c) t = Transpose(i)", [6, 4], 1, 0),
        ("u = Unsqueeze(w, first) t = Transpose<perm=[0,2,1]>(u)", [6, 4], 1, 0),
        ("u = Squeeze(w, first) t = Transpose(u)", [1, 6, 4], 2, 1),
        ("u = Squeeze(w) t = Transpose(u)", [6, 1, 4, 1], 2, 0),
        ("t = Flatten(w)", [4, 2, 3], 0, None),
        ("u = Flatten<axis=-1>(w) t = Transpose(u)", [2, 3, 4], 2, None),
        ("u = Reshape(w, flat) t = Transpose(u)", [6, 2, 2], None, 0),
        ("t = Reshape(w, swapped)", [4, 3, 2], 0, None),
    ],
)
def test_follows_k_through_whatever_moves_the_weight(
    chain: str, shape: list[int], k_axis: int | None, n_axis: int | None
) -> None:
    model = with_weights(f"{chain} y = MatMul(x, t)", w=shape)
    if k_axis is None:
        assert list(find_linears(model.graph)) == []
        assert [u.why for u in find_untraced(model.graph)] == ["a reshape of its weight splits or merges K"]
    else:
        linear = only(model)
        assert (linear.k_axis, linear.n_axis, linear.k, linear.n) == (k_axis, n_axis, 4, 6)
        assert linear.shape == tuple(shape)


def test_follows_the_input_channels_of_a_convolution() -> None:
    for chain, shape, k_axis in (
        ("t = Reshape(w, pointwise)", [5, 8], 1),
        ("t = Unsqueeze(w, both)", [5, 8], 1),
        ("t = Transpose<perm=[1,0,2,3]>(w)", [8, 5, 3, 3], 0),
        ("t = Reshape(w, patches)", [5, 8, 9], 1),
    ):
        linear = only(with_weights(f"{chain} y = Conv(image, t)", "float[1,8,9,9] image", w=shape))
        assert (linear.k_axis, linear.n) == (k_axis, 5)
    model = with_weights("t = Reshape(w, patches) y = Conv(image, t)", "float[1,8,9,9] image", w=[5, 72])
    assert [u.why for u in find_untraced(model.graph)] == ["a reshape of its weight splits or merges K"]


def test_squeeze_of_an_old_opset_has_its_axes_as_an_attribute() -> None:
    model = with_weights("t = Squeeze<axes=[0]>(w) y = MatMul(x, t)", opset=11, w=[1, 4, 6])
    assert (only(model).k_axis, only(model).n_axis) == (1, 2)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = MatMul(x, stack)", "its weight is a stack of 3 matrices"),
        ("t = Reshape(w, size) y = MatMul(x, t)", "the shape in which it reads its weight is not known"),
        ("t = Transpose<perm=[0,0]>(w) y = MatMul(x, t)", "the shape in which it reads its weight is not known"),
        ("y = MatMul(x, empty)", "its weight is empty"),
    ],
)
def test_leaves_out_with_a_reason(body: str, why: str) -> None:
    model = with_weights(body, "float[N,4] x, int64[2] size", w=[4, 6], stack=[3, 4, 6], empty=[4, 0])
    assert list(find_linears(model.graph)) == []
    assert [u.why for u in find_untraced(model.graph)] == [why]


@pytest.mark.parametrize(
    "node",
    [
        "MatMul(x, x)",
        "MatMul(w, w)",
        "MatMul(row, x)",
        "MatMul(column, xt)",
        "com.microsoft.MatMul(x, w)",
        "Add(x, w)",
        "MatMul(x, b)",
        "Conv(x, x)",
    ],
)
def test_is_no_layer_with_a_weight(node: str) -> None:
    model = with_weights(f"y = {node}", "float[4,4] x, float[1,4] xt", w=[4, 4], row=[1, 4], column=[4, 1], b=[4])
    assert list(find_linears(model.graph)) == []
    assert list(find_untraced(model.graph)) == []


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
