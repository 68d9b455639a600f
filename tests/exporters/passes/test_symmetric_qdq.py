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

from exporters.linears import array_of, find_linears
from exporters.lint import lint
from exporters.module_names import MODULE_KEY
from exporters.passes.symmetric_qdq import SymmetricQdq
from exporters.qdq_scales import constant_of
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]

UINT8 = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.25}, uint8 z = {128}, float[2] ws = {0.5, 0.125}, uint8[2] wz = {100, 140},
     uint8[4,2] w = {101, 140, 100, 142, 103, 140, 0, 136}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear<axis=1>(w, ws, wz)
        [fc] y = MatMul(xd, wd)
    }
"""
INT8 = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.25}, int8 z = {0}, float ws = {0.5}, int8[4,2] w = {1, 0, 0, 2, 3, 0, -100, -4}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear(w, ws, z)
        [fc] y = MatMul(xd, wd)
    }
"""


def changed(text: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


IMPLICIT = changed(INT8, ("(w, ws, z)", "(w, ws)"))
PADDLE = """
    <ir_version: 7, opset_import: ["": 13], producer_name: "PaddlePaddle">
    g (float[N,4] x) => (float[N,2] y)
    <int8[4,2] w = {1, 0, 0, 2, 3, 0, -100, -4}>
    {
        s = Constant<value = float[1] {0.1}>()
        z = Constant<value = int8[1] {0}>()
        ws = Constant<value = float[1] {0.3}>()
        wz = Constant<value = int8[1] {0}>()
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear(w, ws, wz)
        y = MatMul(xd, wd)
    }
"""


def inputs() -> npt.NDArray[np.float32]:
    """Numbers on and off the grid, at ties, and far beyond both ends of the range."""
    rows = [[0.125, 0.375, -0.125, 1e6], [-1e6, 31.875, -32.0, 32.0], [31.8, -31.9, 0.3, -0.3]]
    return np.concatenate([np.array(rows, np.float32), np.random.default_rng(0).normal(0, 20, (64, 4)).astype("f4")])


@pytest.mark.parametrize("text", [UINT8, INT8, IMPLICIT, PADDLE])
def test_the_result_is_int8_with_explicit_zeros(text: str) -> None:
    model = ir.from_onnx_text(text)
    SymmetricQdq()(model)
    assert lint(model) == []
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("text", [UINT8, INT8, IMPLICIT, PADDLE])
def test_same_numbers_bit_for_bit(text: str, run: Run) -> None:
    model = ir.from_onnx_text(text)
    before = run(model, x=inputs())
    SymmetricQdq()(model)
    assert np.array_equal(run(model, x=inputs()), before)


@pytest.mark.parametrize("text", [UINT8, INT8, IMPLICIT, PADDLE])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    SymmetricQdq()(model)
    before = ir.to_proto(model)
    assert SymmetricQdq()(model).changed == 0
    assert ir.to_proto(model) == before


def test_shifts_by_128_and_by_the_zero_point_of_each_channel() -> None:
    model = ir.from_onnx_text(UINT8)
    outcome = SymmetricQdq()(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("symmetric Q/DQ", 3, ())
    (linear,) = find_linears(model.graph)
    assert linear.values.tolist() == [[1, 0], [0, 2], [3, 0], [-100, -4]]
    assert linear.values.dtype == np.int8
    assert model.graph[0].outputs[0].dtype == ir.DataType.INT8


def test_changes_nothing_that_is_symmetric_already() -> None:
    model = ir.from_onnx_text(INT8)
    before = ir.to_proto(model)
    assert SymmetricQdq()(model).changed == 0
    assert ir.to_proto(model) == before


def test_keeps_every_bit_of_the_scales() -> None:
    model = ir.from_onnx_text(PADDLE)
    SymmetricQdq()(model)
    (linear,) = find_linears(model.graph)
    assert linear.weight_scale is not None
    assert linear.input_scale == np.float32(0.1)
    assert linear.weight_scale.tobytes() == np.float32(0.3).tobytes()
    assert linear.weight_scale.shape == ()


def test_a_missing_zero_point_of_an_activation_is_uint8_0_and_refused() -> None:
    model = ir.from_onnx_text(changed(INT8, ("(x, s, z)", "(x, s)"), ("(xq, s, z)", "(xq, s)")))
    with pytest.raises(GpusqError, match="q: uint8 with zero-point 0"):
        SymmetricQdq()(model)


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ("uint8 z = {0}", "uint8 with zero-point 0"),
        ("uint8 z = {127}", "uint8 with zero-point 127"),
        ("int8 z = {-128}", "int8 with zero-point -128"),
        ("int8 z = {1}", "int8 with zero-point 1"),
    ],
)
def test_refuses_an_activation_whose_clamp_would_move(zero: str, words: str) -> None:
    model = ir.from_onnx_text(changed(UINT8, ("uint8 z = {128}", zero)))
    model.graph[0].metadata_props[MODULE_KEY] = "blocks.0.fc"
    before = ir.to_proto(model)
    with pytest.raises(GpusqError) as caught:
        SymmetricQdq()(model)
    assert caught.value.message.startswith(
        f"2 Q/DQ nodes cannot become symmetric int8 without changing numbers: "
        f"blocks.0.fc (q): {words}; dq behind q: {words}"
    )
    assert "ActivationSymmetric" in caught.value.hint
    assert ir.to_proto(model) == before


def test_an_activation_behind_relu_is_refused_all_the_same() -> None:
    text = changed(
        UINT8, ("z = {128}", "z = {0}"), ("[q] xq = QuantizeLinear(x,", "r = Relu(x) [q] xq = QuantizeLinear(r,")
    )
    with pytest.raises(GpusqError, match="uint8 with zero-point 0"):
        SymmetricQdq()(ir.from_onnx_text(text))


def test_counts_all_that_fail_and_shows_three() -> None:
    pairs = "".join(f"q{i} = QuantizeLinear(x, s, z) d{i} = DequantizeLinear(q{i}, s, z) " for i in range(3))
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N] x) => (float[N] d0, float[N] d1, float[N] d2) <float s = {{1}}, uint8 z = {{3}}>
        {{ {pairs} }}
    """
    with pytest.raises(GpusqError, match=r"^6 Q/DQ nodes .*; and 3 more$"):
        SymmetricQdq()(ir.from_onnx_text(text))


def test_refuses_a_weight_that_does_not_fit_int8() -> None:
    model = ir.from_onnx_text(changed(UINT8, ("wz = {100, 140}", "wz = {100, 7}")))
    with pytest.raises(GpusqError, match=r"w_dq: its constant reaches from -100 to 135 around its zero-point"):
        SymmetricQdq()(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("(float[N,2] y)", "(float[N,2] y, uint8[N,4] xq)"), "'xq', are an output of the graph"),
        (("[w_dq]", "n = Cast<to=1>(xq) [w_dq]"), r"are read by .* \(Cast\)"),
        (("(float[N,4] x)", "(float[N,4] x, uint8[N,4] i)"), "'i', do not come from a quantizer"),
    ],
)
def test_refuses_integers_that_something_else_reads_or_writes(change: tuple[str, str], words: str) -> None:
    text = changed(UINT8, change)
    if "uint8[N,4] i)" in text:
        text = changed(text, ("DequantizeLinear(xq, s, z)", "DequantizeLinear(i, s, z)"))
    with pytest.raises(GpusqError, match=words):
        SymmetricQdq()(ir.from_onnx_text(text))


def test_refuses_a_pair_whose_zero_points_differ() -> None:
    model = ir.from_onnx_text(
        changed(UINT8, ("uint8 z = {128}", "uint8 z = {128}, uint8 o = {127}"), ("(xq, s, z)", "(xq, s, o)"))
    )
    with pytest.raises(GpusqError, match=r"^2 Q/DQ nodes"):
        SymmetricQdq()(model)


@pytest.mark.parametrize(
    ("scale", "words"),
    [("{-0.25}", r"'q' is negative \(-0.25\) \(1 more"), ("{0}", "'q' is 0"), ("{nan}", "not finite")],
)
def test_refuses_a_scale_that_is_not_positive(scale: str, words: str) -> None:
    model = ir.from_onnx_text(changed(INT8, ("float s = {0.25}", "float s = {1}")))
    value = float(scale.strip("{}"))
    model.graph.initializers["s"].const_value = ir.tensor(np.array(value, np.float32), name="s")
    with pytest.raises(GpusqError, match=words) as caught:
        SymmetricQdq()(model)
    assert "positive" in caught.value.hint


def test_a_dead_channel_gets_the_scale_1_and_is_reported(run: Run) -> None:
    text = changed(
        UINT8,
        ("ws = {0.5, 0.125}", "ws = {0.5, 0}"),
        ("101, 140, 100, 142, 103, 140, 0, 136", "101, 140, 100, 140, 103, 140, 0, 140"),
    )
    model = ir.from_onnx_text(text)
    before = run(model, x=inputs())
    outcome = SymmetricQdq()(model)
    (linear,) = find_linears(model.graph)
    assert linear.weight_scale is not None
    assert linear.weight_scale.tolist() == [0.5, 1.0]
    (report,) = outcome.left_alone
    assert report.where == "w_dq"
    assert report.why == "1 channels (such as 1) hold only zeros and had the scale 0: it is 1 now"
    assert np.array_equal(run(model, x=inputs()), before)


def test_a_channel_of_scale_0_that_is_not_dead_is_refused() -> None:
    with pytest.raises(GpusqError, match="the scale of 'w_dq' is 0"):
        SymmetricQdq()(ir.from_onnx_text(changed(UINT8, ("ws = {0.5, 0.125}", "ws = {0.5, 0}"))))


@pytest.mark.parametrize(("values", "dtype"), [([0, 8, 15, 9], ir.DataType.INT4), ([0, 8, 15, 1], ir.DataType.INT4)])
def test_four_bit_weights_stay_four_bit(values: list[int], dtype: ir.DataType) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 21]>
        g () => (float[4] y) <float s = {0.5}, uint4 z = {8}, uint4[4] w = {1, 2, 3, 4}>
        { [dq] y = DequantizeLinear(w, s, z) }
    """)
    held = model.graph.initializers["w"]
    held.const_value = ir.tensor(np.array(values, np.uint8).astype(ir.DataType.UINT4.numpy()), name="w")
    SymmetricQdq()(model)
    integers = model.graph[0].inputs[0]
    assert integers is not None
    assert integers.dtype == dtype
    assert array_of(integers).astype(np.int32).tolist() == [value - 8 for value in values]


def test_float8_is_no_business_of_this_pass() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 9, opset_import: ["": 19]>
        g (float[N] x) => (float[N] y) <float s = {0.5}, float8e4m3fn z = {0}>
        { xq = QuantizeLinear(x, s, z) y = DequantizeLinear(xq, s, z) }
    """)
    assert SymmetricQdq()(model).changed == 0


@given(st.lists(st.integers(0, 255), min_size=6, max_size=6), st.integers(0, 255), st.integers(0, 255))
def test_a_weight_is_shifted_exactly_or_refused(integers: list[int], first: int, second: int) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["": 17]>
        g () => (float[3,2] y) <float[2] s = {0.3, 7}, uint8[2] z = {0, 0}, uint8[3,2] w = {0, 0, 0, 0, 0, 0}>
        { [dq] y = DequantizeLinear<axis=1>(w, s, z) }
    """)
    weight, zero = np.array(integers, np.uint8).reshape(3, 2), np.array([first, second], np.uint8)
    for name, array in (("w", weight), ("z", zero)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    real = weight.astype(int) - zero.astype(int)
    if real.min() < -128 or real.max() > 127:
        with pytest.raises(GpusqError, match="beyond int8"):
            SymmetricQdq()(model)
        return
    SymmetricQdq()(model)
    node: Any = model.graph[0]
    assert np.array_equal(array_of(node.inputs[0]), real)
    assert not np.any(constant_of(node.inputs[2]))
