from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.linears import find_linears
from exporters.passes.fold_quantized import FoldQuantized
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]

# A float weight behind Q, an integer one behind Transpose, an int32 bias.
FLOAT_WEIGHT = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,2] y)
    <float[2] s = {0.1, 0.25}, int8[2] z = {0, 0}, float[4,2] w = {0.05, 0.125, 0.15, 0.375, 100, -100, -0.34, 0.25}>
    {
        [q] wq = QuantizeLinear<axis=1>(w, s, z)
        [dq] wd = DequantizeLinear<axis=1>(wq, s, z)
        [fc] y = MatMul(x, wd)
    }
"""
TRANSPOSED = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,2] y)
    <float[2] s = {0.1, 0.25}, int8[2] z = {0, 0}, int8[2,4] w = {1, 2, 3, 4, -5, -6, -7, -8}>
    {
        [same] v = Identity(w)
        [turn] t = Transpose<perm=[1,0]>(v)
        [dq] wd = DequantizeLinear<axis=1>(t, s, z)
        [fc] y = MatMul(x, wd)
    }
"""
BIAS = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,2] x) => (float[N,2] y)
    <float[2] s = {0.1, 0.0003}, int32[2] fc_bias_quantized = {123456, -77}, int32[2] z = {0, 0}>
    {
        [dq] b = DequantizeLinear<axis=0>(fc_bias_quantized, s, z)
        [add] y = Add(x, b)
    }
"""
TEXTS = [FLOAT_WEIGHT, TRANSPOSED, BIAS]


def evaluated(model: ir.Model) -> npt.NDArray[np.float32]:
    found: Any = ReferenceEvaluator(ir.to_proto(model)).run(None, {})
    return np.asarray(found[0])


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("text", "left"),
    [(FLOAT_WEIGHT, ["DequantizeLinear", "MatMul"]), (TRANSPOSED, ["DequantizeLinear", "MatMul"]), (BIAS, ["Add"])],
)
def test_folds_what_is_constant(text: str, left: list[str]) -> None:
    model = ir.from_onnx_text(text)
    assert FoldQuantized()(model).changed > 0
    assert op_types(model) == left
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("text", TEXTS)
def test_same_numbers_bit_for_bit(text: str, run: Run) -> None:
    model = ir.from_onnx_text(text)
    x = np.random.default_rng(0).standard_normal((8, 4 if "x, wd" in text else 2), np.float32)
    before = run(model, x=x)
    FoldQuantized()(model)
    assert np.array_equal(run(model, x=x), before)


@pytest.mark.parametrize("text", TEXTS)
def test_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    FoldQuantized()(model)
    before = ir.to_proto(model)
    assert FoldQuantized()(model).changed == 0
    assert ir.to_proto(model) == before


def test_rounds_to_even_and_saturates() -> None:
    model = ir.from_onnx_text(FLOAT_WEIGHT)
    FoldQuantized()(model)
    (linear,) = find_linears(model.graph)
    assert linear.values.tolist() == [[0, 0], [2, 2], [127, -128], [-3, 1]]


def test_a_transposed_weight_is_stored_as_it_is_read() -> None:
    model = ir.from_onnx_text(TRANSPOSED)
    FoldQuantized()(model)
    (linear,) = find_linears(model.graph)
    assert linear.values.tolist() == [[1, -5], [2, -6], [3, -7], [4, -8]]


def test_a_bias_is_exactly_integer_times_scale() -> None:
    model = ir.from_onnx_text(BIAS)
    FoldQuantized()(model)
    held = model.graph.initializers["fc_bias"]
    assert held.const_value is not None
    wanted = np.array([123456, -77], np.float32) * np.array([0.1, 0.0003], np.float32)
    assert held.const_value.numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    "node",
    [
        "y = Transpose<perm=[1,0]>(w)",
        "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)",
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        "t = Transpose<perm=[1,0]>(x) q = QuantizeLinear(t, s, z) y = DequantizeLinear(q, s, z)",
    ],
    ids=["an output", "read by no quantizer", "an activation", "an activation moved"],
)
def test_leaves_what_is_not_a_quantized_constant_alone(node: str) -> None:
    model = ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}, float s = {{0.5}}, int8 z = {{0}}>
        {{ {node} }}
    """)
    before = ir.to_proto(model).graph.node
    assert FoldQuantized()(model).changed == 0
    assert ir.to_proto(model).graph.node == before


def test_a_weight_that_something_else_reads_stays_beside_its_folded_form(run: Run) -> None:
    text = TRANSPOSED.replace(
        "[fc] y = MatMul(x, wd)", "[fc] p = MatMul(x, wd) i = ReduceMin<keepdims=0>(v) f = Cast<to=1>(i) y = Add(p, f)"
    )
    model = ir.from_onnx_text(text)
    x = np.ones((1, 4), np.float32)
    before = run(model, x=x)
    FoldQuantized()(model)
    assert np.array_equal(run(model, x=x), before)


def test_a_dead_channel_of_a_float_weight_becomes_zeros() -> None:
    text = FLOAT_WEIGHT.replace("s = {0.1, 0.25}", "s = {0.1, 0}").replace(
        "0.05, 0.125, 0.15, 0.375, 100, -100, -0.34, 0.25", "0.05, 0, 0.15, 0, 100, 0, -0.34, 0"
    )
    model = ir.from_onnx_text(text)
    FoldQuantized()(model)
    (linear,) = find_linears(model.graph)
    assert linear.values[:, 1].tolist() == [0, 0, 0, 0]


def test_refuses_a_scale_of_another_length_than_the_weight() -> None:
    model = ir.from_onnx_text(TRANSPOSED.replace("float[2] s = {0.1, 0.25}", "float[3] s = {0.1, 0.25, 1}"))
    with pytest.raises(GpusqError, match="the scale of 'dq' "):
        FoldQuantized()(model)


@given(st.lists(st.floats(-300, 300, width=32), min_size=3, max_size=3), st.floats(2.0**-20, 2.0**20, width=32))
def test_a_folded_quantizer_agrees_with_onnx(values: list[float], scale: float) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 9, opset_import: ["": 19]>
        g () => (float[3] y) <float s = {1}, uint8 z = {9}, float[3] w = {0, 0, 0}>
        { q = QuantizeLinear(w, s, z) y = DequantizeLinear(q, s, z) }
    """)
    for name, array in (("w", np.array(values, np.float32)), ("s", np.array(scale, np.float32))):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    before = evaluated(model)
    FoldQuantized()(model)
    assert np.array_equal(evaluated(model), before)
