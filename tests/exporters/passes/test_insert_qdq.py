from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporters.linears import array_of, find_linears
from exporters.lint import lint
from exporters.passes.insert_qdq import InsertQdq, QuantizedLinear
from exporters.passes.outcome import LeftAlone
from exporters.to_onnx import MODULE_KEY
from profiles.errors import GpusqError

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]

MATMUL = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float[4,2] w = {0.5, 0, 0, 0.25, 0, -1, -0.5, 0}, float[2] b = {0.3, -0.7}>
    {
        [fc] t = MatMul(x, w)
        [add] y = Add(t, b)
    }
"""
GEMM = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float[2,4] w = {0.5, 0, 0, -0.5, 0, 0.25, -1, 0}, float[2] b = {0.3, -0.7}>
    { [fc] y = Gemm<transB=1>(x, w, b) }
"""
ONE_BY_ONE = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float[N,1] x) => (float[N,1] y)
    <float[1,1] w = {1}>
    { [fc] y = MatMul(x, w) }
"""
SIBLINGS = """
    <ir_version: 10, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,1] y)
    <float[4,1] w1 = {1, 0, 0, 2}, float[4,1] w2 = {0, 3, 4, 0}>
    {
        [first] t = MatMul(x, w1)
        [second] u = MatMul(x, w2)
        [add] y = Add(t, u)
    }
"""

FC = QuantizedLinear(
    weight=np.array([[100, 0, 0, -127], [0, 31, -90, 0]], np.int8),
    weight_scale=np.array([0.005, 0.0111], np.float32),
    input_scale=np.array(0.0173, np.float32),
)
NARROW = QuantizedLinear(np.array([[1, 0, 0, 2]], np.int8), np.ones(1, np.float32), np.array(0.1, np.float32))


def fake_quantize(x: Float, scale: Float) -> Float:
    """The formula of the docstring, in float32 as ONNX computes it."""
    quantized: Float = np.clip(np.rint(x / scale), np.float32(-128), np.float32(127))
    return quantized * scale


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("text", [MATMUL, GEMM])
def test_puts_a_pair_before_the_input_and_a_dq_behind_the_weight(text: str) -> None:
    model = ir.from_onnx_text(text)
    outcome = InsertQdq({"fc": FC})(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("insert Q/DQ", 1, ())
    (linear,) = find_linears(model.graph)
    assert op_types(model)[:4] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", linear.node.op_type]
    assert (linear.weight_type, linear.activation_type) == ("int8", "int8")
    assert lint(model) == []


@pytest.mark.parametrize(("text", "axis"), [(MATMUL, 1), (GEMM, 0)])
def test_stores_the_integers_as_the_node_reads_them(text: str, axis: int) -> None:
    model = ir.from_onnx_text(text)
    InsertQdq({"fc": FC})(model)
    (linear,) = find_linears(model.graph)
    assert np.array_equal(linear.values, FC.weight.T if axis == 1 else FC.weight)
    assert linear.weight_dq is not None
    assert linear.weight_dq.attributes["axis"].as_int() == axis


def test_keeps_trained_scales_bit_for_bit() -> None:
    model = ir.from_onnx_text(MATMUL)
    InsertQdq({"fc": FC})(model)
    held = model.graph.initializers
    assert array_of(held["fc.weight_scale"]).tobytes() == FC.weight_scale.tobytes()
    assert array_of(held["fc.input_scale"]).tobytes() == FC.input_scale.tobytes()


def test_names_what_it_adds_after_the_module_and_drops_the_float_weight() -> None:
    model = ir.from_onnx_text(MATMUL)
    next(iter(model.graph)).metadata_props[MODULE_KEY] = "blocks.0.fc"
    InsertQdq({"blocks.0.fc": FC})(model)
    assert [node.name for node in model.graph][:3] == [
        "blocks.0.fc/QuantizeLinear",
        "blocks.0.fc/DequantizeLinear",
        "blocks.0.fc/DequantizeLinear_2",
    ]
    assert "w" not in model.graph.initializers
    assert {node.metadata_props.get(MODULE_KEY) for node in list(model.graph)[:4]} == {"blocks.0.fc"}


@pytest.mark.parametrize("text", [MATMUL, GEMM])
def test_same_numbers_as_the_fake_quantized_layer(text: str, run: Run) -> None:
    model = ir.from_onnx_text(text)
    bias = array_of(model.graph.initializers["b"]).astype(np.float32)
    InsertQdq({"fc": FC})(model)
    x = np.random.default_rng(0).standard_normal((64, 4), np.float32)
    expected = fake_quantize(x, FC.input_scale) @ (FC.weight * FC.weight_scale[:, None]).T + bias
    assert np.abs(run(model, x=x) - expected).max() <= 1e-6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.floats(2.0**-20, 64, width=32),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
)
@example(scale=0.5, values=[0.25, 0.75, -0.25, -0.75, 63.75, 1e4, -64.25, -1e4, -0.0])
@example(scale=0.0123456789, values=[0.0123456789 * (n + 0.5) for n in range(-5, 4)])
def test_quantizes_bit_for_bit_by_the_formula(scale: float, values: list[float], run: Run) -> None:
    model = ir.from_onnx_text(ONE_BY_ONE)
    input_scale = np.array(scale, np.float32)
    InsertQdq({"fc": QuantizedLinear(np.ones((1, 1), np.int8), np.ones(1, np.float32), input_scale)})(model)
    x = np.array(values, np.float32)[:, None]
    assert np.array_equal(run(model, x=x), fake_quantize(x, input_scale))


def test_layers_that_read_one_tensor_with_one_scale_share_its_q() -> None:
    model = ir.from_onnx_text(SIBLINGS)
    InsertQdq({"first": NARROW, "second": NARROW})(model)
    assert op_types(model).count("QuantizeLinear") == 1
    first, second = find_linears(model.graph)
    assert first.input_q is second.input_q
    assert first.node.inputs[0] is not second.node.inputs[0]


def test_layers_that_read_one_tensor_with_two_scales_get_a_q_each(run: Run) -> None:
    model = ir.from_onnx_text(SIBLINGS)
    wide = replace(NARROW, input_scale=np.array(0.25, np.float32))
    InsertQdq({"first": NARROW, "second": wide})(model)
    assert [linear.input_scale for linear in find_linears(model.graph)] == [float(np.float32(0.1)), 0.25]
    x = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    weight = NARROW.weight.astype(np.float32).T
    expected = fake_quantize(x, NARROW.input_scale) @ weight + fake_quantize(x, wide.input_scale) @ weight
    assert np.abs(run(model, x=x) - expected).max() <= 1e-6


def test_leaves_a_layer_without_trained_scales_alone_and_says_so() -> None:
    model = ir.from_onnx_text(SIBLINGS)
    outcome = InsertQdq({"second": NARROW})(model)
    assert outcome.changed == 1
    assert outcome.left_alone == (LeftAlone("first", "it has no trained scales"),)
    assert [linear.weight_dq is None for linear in find_linears(model.graph)] == [True, False]


def test_a_second_run_changes_nothing() -> None:
    model = ir.from_onnx_text(MATMUL)
    InsertQdq({"fc": FC})(model)
    before = ir.to_proto(model)
    outcome = InsertQdq({"fc": FC})(model)
    assert (outcome.changed, outcome.left_alone) == (0, (LeftAlone("fc", "it has Q/DQ already"),))
    assert ir.to_proto(model) == before


def test_trained_scales_that_no_layer_takes_are_an_error() -> None:
    with pytest.raises(GpusqError, match=r"no linear layer 'gone' and 1 more$") as caught:
        InsertQdq({"fc": FC, "lost": FC, "gone": FC})(ir.from_onnx_text(MATMUL))
    assert "would be lost" in caught.value.hint


def test_a_matmul_of_two_activations_takes_no_scales() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 23]>
        g (float[N,4,4] x) => (float[N,4,4] y)
        { [fc] y = MatMul(x, x) }
    """)
    with pytest.raises(GpusqError, match=r"the exported graph has no linear layer 'fc'$"):
        InsertQdq({"fc": FC})(model)
