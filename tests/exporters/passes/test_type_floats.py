from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from exporters.linears import array_of, find_linears
from exporters.module_names import MODULE_KEY
from exporters.passes.outcome import LeftAlone
from exporters.passes.type_floats import TypeFloats
from profiles.errors import GpusqError

Run = Callable[..., npt.NDArray[np.float32]]
FLOAT, FLOAT16, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
WHY = "it is no float16 number: kept in float32, and its GEMM writes Float, not Half"

FLOATS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float[4] gain = {1, 0.9, 1.1, 1}, float[4] shift = {0, 0.1, 0, -0.2}, float[N,4] normal,
     float[4,2] w = {0.5, 0, 0, 0.25, 0, -1.7, -0.5, 0}>
    {
        [norm] normal = LayerNormalization<axis=-1>(x, gain, shift)
        [fc] y = MatMul(normal, w)
    }
"""
QUANTIZED = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.0625}, int8 z = {0}, float[2] ws = {0.125, 0.00390625}, int8[2] wz = {0, 0},
     int8[4,2] w = {90, 0, 0, 31, 0, -127, -45, 0}, float[2] b = {0.3, -0.7},
     int8[N,4] xq, float[N,4] xd, float[4,2] wd, float[N,2] t>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear<axis=1>(w, ws, wz)
        [fc] t = MatMul(xd, wd)
        [add] y = Add(t, b)
    }
"""
INEXACT = QUANTIZED.replace("s = {0.0625}", "s = {0.1}").replace("{0.125,", "{0.3,")
RELU = ("[q] xq = QuantizeLinear(x,", "[relu] r = Relu(x) [q] xq = QuantizeLinear(r,")
HIDDEN, HIDDEN_INEXACT = QUANTIZED.replace(*RELU), INEXACT.replace(*RELU)


def typed(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    TypeFloats("float16")(model)
    return model


def evaluated(model: ir.Model, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    found: Any = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    return np.asarray(found[0])


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_types_every_constant_and_tensor() -> None:
    model = ir.from_onnx_text(FLOATS)
    outcome = TypeFloats("float16")(model)
    assert (outcome.name, outcome.changed, outcome.left_alone) == ("type float16", 7, ())
    assert {value.dtype for value in model.graph.initializers.values()} == {FLOAT16}
    assert [node.outputs[0].dtype for node in model.graph] == [FLOAT16, FLOAT16, FLOAT16, FLOAT]


def test_types_a_graph_that_has_no_constant_to_type() -> None:
    model = typed(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[N, 4] x) => (float[N, 4] y) { h = Relu(x)  y = Exp(h) }"""
    )
    assert op_types(model) == ["Cast", "Relu", "Exp", "Cast"]
    assert TypeFloats("float16")(model).changed == 0


def test_inputs_and_outputs_stay_float32_behind_a_cast() -> None:
    model = typed(FLOATS)
    assert op_types(model) == ["Cast", "LayerNormalization", "MatMul", "Cast"]
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), ("x", "y"), strict=True):
        assert (value.name, value.dtype) == (name, FLOAT)


def test_leaves_integers_alone() -> None:
    held = typed(QUANTIZED).graph.initializers
    assert {name for name, value in held.items() if value.dtype == INT8} == {"z", "wz", "w"}
    assert array_of(held["w"]).tolist() == [[90, 0], [0, 31], [0, -127], [-45, 0]]


def test_a_scale_that_float16_holds_becomes_float16_without_a_cast() -> None:
    model = ir.from_onnx_text(HIDDEN)
    assert TypeFloats("float16")(model).left_alone == ()
    assert model.graph.initializers["s"].dtype == FLOAT16
    assert op_types(model).count("Cast") == 2
    (linear,) = find_linears(model.graph)
    assert linear.input_scale == 0.0625


def test_a_scale_that_float16_does_not_hold_keeps_its_bits_between_casts_and_is_reported() -> None:
    model = ir.from_onnx_text(HIDDEN_INEXACT)
    trained = {name: array_of(model.graph.initializers[name]).tobytes() for name in ("s", "ws")}
    outcome = TypeFloats("float16")(model)
    assert outcome.left_alone == (LeftAlone("s", WHY), LeftAlone("ws", WHY))
    assert {name: array_of(model.graph.initializers[name]).tobytes() for name in trained} == trained
    assert op_types(model) == [
        *("Cast", "Relu", "Cast", "QuantizeLinear", "DequantizeLinear", "Cast"),
        *("DequantizeLinear", "Cast", "MatMul", "Add", "Cast"),
    ]
    (linear,) = find_linears(model.graph)
    assert [value.dtype for value in linear.node.inputs if value] == [FLOAT16, FLOAT16]


@pytest.mark.parametrize("scale", [0.0625, 0.1])
def test_an_input_is_quantized_from_float32_behind_data_movement(scale: float) -> None:
    """Held against ONNX's reference: onnxruntime 1.32 optimizes a float32 DQ, Cast, float16 MatMul inexactly."""
    text = QUANTIZED.replace("s = {0.0625}", f"s = {{{scale}}}")
    text = text.replace("[q] xq = QuantizeLinear(x,", "[turn] r = Transpose<perm=[0,1]>(x) [q] xq = QuantizeLinear(r,")
    model = typed(text)
    assert op_types(model)[:2] == ["Transpose", "QuantizeLinear"]
    turn, quantize = model.graph[0], model.graph[1]
    assert turn.outputs[0].dtype != FLOAT16
    assert quantize.inputs[1] is not None
    assert quantize.inputs[1].dtype == FLOAT
    assert float(array_of(quantize.inputs[1])) == np.float32(scale)
    assert TypeFloats("float16")(model).changed == 0
    x = np.random.default_rng(0).standard_normal((64, 4), np.float32)  # no float16 numbers
    before, after = evaluated(ir.from_onnx_text(text), x), evaluated(model, x)
    assert np.abs(after - before).max() <= 2e-3 * np.abs(before).max()


def test_an_input_that_is_also_computed_with_is_cast() -> None:
    also = "[sum] p = ReduceSum<keepdims=1>(x) [a] u = Add(t, p) [add] y = Add(u, b)"
    text = QUANTIZED.replace("[add] y = Add(t, b)", also)
    assert op_types(typed(text))[0] == "Cast"


def test_a_cast_around_a_scale_belongs_to_its_module() -> None:
    model = ir.from_onnx_text(HIDDEN_INEXACT)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "fc"
    TypeFloats("float16")(model)
    casts = [node.name for node in model.graph if node.metadata_props.get(MODULE_KEY) and node.op_type == "Cast"]
    assert casts == ["fc/Cast", "fc/Cast_2", "fc/Cast_3"]


@given(scale=st.floats(2.0**-30, 2.0**15, width=32))
@example(scale=0.5)
@example(scale=2.0**-24)  # float16's smallest
@example(scale=2.0**-25)
@example(scale=65504.0)  # float16's largest
@example(scale=1 + 2.0**-11)
def test_changes_no_scale(scale: float) -> None:
    model = ir.from_onnx_text(QUANTIZED)
    model.graph.initializers["s"].const_value = ir.tensor(np.array(scale, np.float32), name="s")
    TypeFloats("float16")(model)
    kept = array_of(model.graph.initializers["s"])
    assert float(kept) == scale
    assert (kept.dtype == np.float16) == (float(np.float16(scale)) == scale)


@pytest.mark.parametrize("text", [FLOATS, HIDDEN, HIDDEN_INEXACT], ids=["floats", "float16 scales", "float32 scales"])
def test_same_numbers_within_the_rounding_of_float16(text: str, run: Run) -> None:
    x = np.random.default_rng(0).integers(-64, 64, (64, 4)).astype(np.float32) / 16  # float16 numbers
    before = run(ir.from_onnx_text(text), x=x)
    assert np.abs(run(typed(text), x=x) - before).max() <= 2e-3 * np.abs(before).max()


def test_a_cast_to_float32_in_the_graph_follows() -> None:
    model = typed("""
        <ir_version: 11, opset_import: ["": 23]>
        g (uint8[N,2] i) => (float[N,2] y)
        <float half = {0.5}, float[N,2] f>
        {
            [cast] f = Cast<to=1>(i)
            [mul] y = Mul(f, half)
        }
    """)
    cast = model.graph[0]
    assert (cast.attributes["to"].as_int(), cast.outputs[0].dtype) == (int(FLOAT16), FLOAT16)


@pytest.mark.parametrize("text", [FLOATS, QUANTIZED, INEXACT, HIDDEN, HIDDEN_INEXACT])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    first = TypeFloats("float16")(model)
    before = ir.to_proto(model)
    second = TypeFloats("float16")(model)
    assert (second.changed, second.left_alone) == (0, first.left_alone)
    assert ir.to_proto(model) == before


def test_a_cast_stands_before_every_node_that_reads_it() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["": 23]>
        g (int8[N,4] x) => (float[N,4] y)
        <float s = {0.1}, int8 z = {0}, float[4] b = {1, 2, 3, 4}>
        {
            [dq] d = DequantizeLinear(x, s, z)
            [first] t = Add(b, b)
            [second] y = Add(d, t)
        }
    """)
    dq, first, _ = model.graph
    first.replace_input_with(0, dq.outputs[0])  # now the second is the first of its users
    TypeFloats("float16")(model)
    assert [node.name for node in model.graph][:3] == ["dq", "Cast", "first"]
    onnx.checker.check_model(ir.to_proto(model))


def test_a_mask_of_infinities_is_no_overflow() -> None:
    model = ir.from_onnx_text(FLOATS)
    model.graph.initializers["shift"].const_value = ir.tensor(np.array([0, -np.inf, 0, 1], np.float32))
    TypeFloats("float16")(model)
    assert array_of(model.graph.initializers["shift"]).tolist() == [0, -np.inf, 0, 1]


def test_does_not_touch_the_types_of_the_model_it_was_cloned_from() -> None:
    original = ir.from_onnx_text(QUANTIZED)
    before = ir.to_proto(original)
    TypeFloats("float16")(original.clone())
    assert ir.to_proto(original) == before


def test_a_constant_beyond_float16_is_an_error() -> None:
    with pytest.raises(GpusqError, match=r"^constant 'w' holds 70000, beyond the range of float16$") as caught:
        TypeFloats("float16")(ir.from_onnx_text(FLOATS.replace("-1.7", "-70000")))
    assert "--precision fp32" in caught.value.hint


def test_io_types_of_the_graph_need_no_cast(run: Run) -> None:
    model = ir.from_onnx_text(FLOATS)
    TypeFloats("float16", io_types="graph")(model)
    assert op_types(model) == ["LayerNormalization", "MatMul"]
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [FLOAT16, FLOAT16]
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    x = np.random.default_rng(0).integers(-64, 64, (64, 4)).astype(np.float32) / 16
    before = run(ir.from_onnx_text(FLOATS), x=x)
    assert np.abs(run(model, x=x.astype(np.float16)) - before).max() <= 2e-3 * np.abs(before).max()
    assert TypeFloats("float16", io_types="graph")(model).changed == 0


def test_io_types_of_the_graph_take_away_the_casts_of_a_typed_graph() -> None:
    model = typed(FLOATS)
    TypeFloats("float16", io_types="graph")(model)
    fresh = ir.from_onnx_text(FLOATS)
    TypeFloats("float16", io_types="graph")(fresh)
    assert op_types(model) == op_types(fresh)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {FLOAT16}


def test_an_output_that_is_computed_in_float32_is_cast_to_the_type_of_the_graph() -> None:
    quantized = "[q2] v = QuantizeLinear(u, s, z) [dq2] y = DequantizeLinear(v, s, z)"
    model = ir.from_onnx_text(INEXACT.replace("[add] y = Add(t, b)", f"[add] u = Add(t, b) {quantized}"))
    TypeFloats("float16", io_types="graph")(model)
    (output,) = model.graph.outputs
    assert (output.name, output.dtype) == ("y", FLOAT16)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("text", [FLOATS, QUANTIZED, INEXACT, HIDDEN, HIDDEN_INEXACT])
def test_types_as_bfloat16_and_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    first = TypeFloats("bfloat16")(model)
    assert first.name == "type bfloat16"
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    before = ir.to_proto(model)
    assert TypeFloats("bfloat16")(model).changed == 0
    assert ir.to_proto(model) == before


def test_a_constant_that_float16_cannot_hold_is_none_to_bfloat16() -> None:
    model = ir.from_onnx_text(FLOATS.replace("-1.7", "-70000"))
    TypeFloats("bfloat16")(model)
    assert model.graph.initializers["w"].dtype == ir.DataType.BFLOAT16
