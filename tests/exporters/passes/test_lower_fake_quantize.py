from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exporters.linears import array_of, find_linears
from exporters.lint import lint
from exporters.module_names import MODULE_KEY
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.quantizer import Quantizer

Float = npt.NDArray[np.float32]
Run = Callable[..., Float]

LINEAR = """
    <ir_version: 10, opset_import: ["": 23, "gpusq": 1]>
    g (float[N,4] x) => (float[N,2] y)
    <
        float[2,4] w = {0.5, 0, 0, -0.635, 0, 0.3441, -0.999, 0},
        float s = {0.0173}, float[2] ws = {0.005, 0.0111}
    >
    {
        a = gpusq.FakeQuantize<low=-128, high=127, place="fc.input">(x, s)
        q = gpusq.FakeQuantize<low=-127, high=127, axis=0, place="fc.weight">(w, ws)
        t = Transpose<perm=[1,0]>(q)
        [fc] y = MatMul(a, t)
    }
"""
GEMM = LINEAR.replace("t = Transpose<perm=[1,0]>(q)", "").replace("MatMul(a, t)", "Gemm<transB=1>(a, q)")
FLOAT_INPUT = LINEAR.replace('a = gpusq.FakeQuantize<low=-128, high=127, place="fc.input">(x, s)', "a = Identity(x)")
ONE = """
    <ir_version: 10, opset_import: ["": 23, "gpusq": 1]>
    g (float[N,1] x) => (float[N,1] y)
    <float s = {%r}>
    { y = gpusq.FakeQuantize<low=%d, high=%d, place="input">(x, s) }
"""
SIBLINGS = """
    <ir_version: 10, opset_import: ["": 23, "gpusq": 1]>
    g (float[N,4] x) => (float[N,4] y)
    <float s = {0.1}, float r = {%s}>
    {
        a = gpusq.FakeQuantize<low=-128, high=127, place="first.input">(x, s)
        b = gpusq.FakeQuantize<low=-128, high=127, place="second.input">(x, r)
        y = Add(a, b)
    }
"""
WEIGHT = np.array([[100, 0, 0, -127], [0, 31, -90, 0]], np.int8)
WEIGHT_SCALE = np.array([0.005, 0.0111], np.float32)
INPUT_SCALE = np.array(0.0173, np.float32)


def lowered(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "fc"
    LowerFakeQuantize()(model)
    return model


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("text", "product"), [(LINEAR, "MatMul"), (GEMM, "Gemm")])
def test_puts_a_pair_before_the_input_and_a_dq_behind_the_integers(text: str, product: str) -> None:
    model = lowered(text)
    assert types(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", product]
    (linear,) = find_linears(model.graph)
    assert (linear.weight_type, linear.activation_type) == ("int8", "int8")
    assert lint(model) == []
    assert model.opset_imports == {"": 23}


@pytest.mark.parametrize(("text", "axis"), [(LINEAR, 1), (GEMM, 0)])
def test_stores_the_integers_as_the_node_reads_them(text: str, axis: int) -> None:
    (linear,) = find_linears(lowered(text).graph)
    assert np.array_equal(linear.values, WEIGHT.T if axis == 1 else WEIGHT)
    assert linear.weight_dq is not None
    assert linear.weight_dq.attributes["axis"].as_int() == axis


def test_keeps_scales_bit_for_bit_and_names_them_after_their_place() -> None:
    held = lowered(LINEAR).graph.initializers
    assert set(held) == {
        "fc.input_scale",
        "zero_point_int8",
        "fc.weight_int8",
        "fc.weight_scale",
        "fc.weight_zero_point",
    }
    assert array_of(held["fc.weight_scale"]).tobytes() == WEIGHT_SCALE.tobytes()
    assert array_of(held["fc.input_scale"]).tobytes() == INPUT_SCALE.tobytes()


@pytest.mark.parametrize("text", [LINEAR, GEMM])
def test_same_numbers_as_the_formula(text: str, run: Run) -> None:
    x = np.random.default_rng(0).standard_normal((64, 4), np.float32)
    quantizer = Quantizer(INPUT_SCALE)
    expected = quantizer.real(quantizer.integers(x)) @ (WEIGHT * WEIGHT_SCALE[:, None]).T
    assert np.abs(run(lowered(text), x=x) - expected).max() <= 1e-6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scale=st.floats(2.0**-20, 64, width=32),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9),
    bounds=st.sampled_from([(-128, 127), (-8, 7), (0, 127), (-1, 1)]),
)
@example(scale=0.5, values=[0.25, 0.75, -0.25, -0.75, 63.75, 1e4, -64.25, -1e4, -0.0], bounds=(-128, 127))
@example(scale=0.0123456789, values=[0.0123456789 * (n + 0.5) for n in range(-5, 4)], bounds=(-2, 1))
def test_quantizes_bit_for_bit_by_the_formula(
    scale: float, values: list[float], bounds: tuple[int, int], run: Run
) -> None:
    x = np.array(values, np.float32)[:, None]
    quantizer = Quantizer(np.array(scale, np.float32), low=bounds[0], high=bounds[1])
    model = ir.from_onnx_text(ONE % (1.0, *bounds))
    scale_value = model.graph.initializers["s"]
    scale_value.const_value = ir.tensor(quantizer.scale, name="s")
    LowerFakeQuantize()(model)
    assert np.array_equal(run(model, x=x), quantizer.real(quantizer.integers(x)))


def test_a_full_range_needs_no_clip_and_a_narrow_one_does() -> None:
    assert types(lowered(ONE % (0.5, -127, 127))) == ["QuantizeLinear", "DequantizeLinear"]
    assert types(lowered(ONE % (0.5, -8, 7))) == ["Clip", "QuantizeLinear", "DequantizeLinear"]


def test_a_range_from_zero_needs_no_clip_behind_relu() -> None:
    text = (ONE % (0.5, 0, 127)).replace("{ y = ", "{ r = Relu(x) y = ").replace("(x, s)", "(r, s)")
    assert types(lowered(text)) == ["Relu", "QuantizeLinear", "DequantizeLinear"]


def test_layers_that_read_one_tensor_with_one_scale_share_its_q() -> None:
    assert types(lowered(SIBLINGS % "0.1")).count("QuantizeLinear") == 1
    assert types(lowered(SIBLINGS % "0.1")).count("DequantizeLinear") == 2


def test_layers_that_read_one_tensor_with_two_scales_get_a_q_each() -> None:
    assert types(lowered(SIBLINGS % "0.25")).count("QuantizeLinear") == 2


@pytest.mark.parametrize("second", ["fc.weight", "tied.weight"], ids=["a module that is called twice", "a tied weight"])
def test_a_weight_that_is_read_twice_stores_its_integers_once(second: str) -> None:
    again = f"""
        r = gpusq.FakeQuantize<low=-127, high=127, axis=0, place="{second}">(w, ws)
        u = Transpose<perm=[1,0]>(r)
        v = MatMul(a, u)
        y = Add(v, v)
    """
    model = lowered(LINEAR.replace("y = MatMul(a, t)", "z = MatMul(a, t)" + again))
    stored = [name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.INT8]
    assert [name for name in stored if name.endswith("weight_int8")] == ["fc.weight_int8"]


@pytest.mark.parametrize(("text", "stored"), [(FLOAT_INPUT, "INT4"), (LINEAR, "INT8")])
def test_four_bits_are_int4_where_only_the_weight_is_quantized(text: str, stored: str) -> None:
    model = lowered(text.replace("low=-127, high=127", "low=-8, high=7"))
    (linear,) = find_linears(model.graph)
    assert linear.weight.dtype == ir.DataType[stored]


def test_blocks_keep_their_scales_and_turn_with_the_weight(run: Run) -> None:
    text = """
        <ir_version: 10, opset_import: ["": 23, "gpusq": 1]>
        g (float[N,4] x) => (float[N,2] y)
        <float[2,4] w = {1, 2, 30, -40, 5, -6, 0.6, 0.7}, float[2,2] s = {1, 10, 1, 0.1}>
        {
            q = gpusq.FakeQuantize<low=-8, high=7, axis=1, block_size=2, place="fc.weight">(w, s)
            t = Transpose<perm=[1,0]>(q)
            y = MatMul(x, t)
        }
    """
    model = lowered(text)
    dq = model.graph[0]
    assert (dq.attributes["axis"].as_int(), dq.attributes["block_size"].as_int()) == (0, 2)
    expected = np.array([[1, 2, 30, -40], [5, -6, 0.6, 0.7]], np.float32)
    assert np.allclose(run(model, x=np.eye(4, dtype=np.float32)), expected.T, rtol=1e-6)


def test_leaves_a_graph_without_quantizers_alone_and_a_second_run_changes_nothing() -> None:
    model = lowered(LINEAR)
    before = ir.to_proto(model)
    assert LowerFakeQuantize()(model).changed == 0
    assert ir.to_proto(model) == before
