from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.float_islands import KEPT_KEY
from exporters.passes.lower_rms_norm import LowerRmsNorm
from exporters.passes.outcome import LeftAlone
from exporters.passes.set_opset import SetOpset
from exporters.passes.type_floats import TypeFloats

Run = Callable[..., npt.NDArray[Any]]
NORM = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,3,4] x) => (float[N,3,4] y) <SCALE scale = {VALUES}>
    { [norm] y = RMSNormalization<axis = AXIS, epsilon = 1e-6>(x, scale) }
"""
LAST = NORM.replace("SCALE", "float[4]").replace("{VALUES}", "{1, 0.5, -2, 3}").replace("AXIS", "-1")
BOTH = NORM.replace("SCALE", "float[3,4]").replace("{VALUES}", f"{{{', '.join(map(str, range(12)))}}}")
WRITTEN = """
    <ir_version: 9, opset_import: ["": 20]>
    g (float[N,4] x) => (float[N,4] y)
    <float two = {2}, float epsilon = {1e-6}, int64[1] last = {-1}, float[4] scale = {1, 0.5, -2, 3}>
    {
        square = Pow(x, two)
        mean = ReduceMean(square, last)
        shifted = Add(mean, epsilon)
        root = Sqrt(shifted)
        [div] normal = Div(x, root)
        y = Mul(normal, scale)
    }
"""
KEPT = ["Mul", "ReduceMean", "Add", "Sqrt", "Div"]


def lowered(text: str) -> ir.Model:
    model = ir.from_onnx_text(text)
    assert LowerRmsNorm()(model).changed == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def kept(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if KEPT_KEY in node.metadata_props]


@pytest.mark.parametrize("text", [LAST, BOTH.replace("AXIS", "-2"), BOTH.replace("AXIS", "1")])
def test_gives_the_same_numbers_at_an_opset_without_the_operator(text: str, run: Run) -> None:
    model = lowered(text)
    assert SetOpset(20)(model).changed == 1
    x = np.random.default_rng(0).standard_normal((5, 3, 4), np.float32)
    expected = run(ir.from_onnx_text(text), x=x)
    assert np.abs(run(model, x=x) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("text", [LAST, WRITTEN])
def test_computes_the_mean_square_in_float32_when_the_graph_is_float16(text: str, run: Run) -> None:
    model = lowered(text)
    TypeFloats("float16")(model)
    assert kept(model) == KEPT
    assert {node.outputs[0].dtype for node in model.graph if KEPT_KEY in node.metadata_props} == {ir.DataType.FLOAT}
    x = np.random.default_rng(0).standard_normal((5, 3, 4), np.float32) * 1000  # x² is beyond float16
    x = x.reshape(-1, 4) if text == WRITTEN else x
    expected = run(ir.from_onnx_text(text), x=x)
    assert np.abs(run(model, x=x) - expected).max() <= 2e-3 * np.abs(expected).max()


def test_a_graph_that_is_float16_already_is_cast(run: Run) -> None:
    model = ir.from_onnx_text(LAST)
    TypeFloats("float16", io_types="graph")(model)
    assert LowerRmsNorm()(model).changed == 1
    assert [node.op_type for node in model.graph] == ["Cast", *KEPT, "Cast", "Mul"]
    SetOpset(20)(model)
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float16) * np.float16(1000)
    expected = run(ir.from_onnx_text(LAST), x=x.astype(np.float32))
    assert np.abs(run(model, x=x) - expected).max() <= 2e-3 * np.abs(expected).max()


def test_keeps_the_module_and_the_name_of_the_output() -> None:
    model = ir.from_onnx_text(LAST)
    model.graph[0].metadata_props[MODULE_KEY] = "norm"
    LowerRmsNorm()(model)
    assert {node.metadata_props[MODULE_KEY] for node in model.graph} == {"norm"}
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_an_unknown_shape_is_left_alone() -> None:
    model = ir.from_onnx_text(LAST)
    model.graph.inputs[0].shape = None
    outcome = LowerRmsNorm()(model)
    assert (outcome.changed, outcome.left_alone) == (
        0,
        (LeftAlone("norm", "the type or shape of its input is unknown"),),
    )


def test_a_layer_normalization_is_none() -> None:
    model = ir.from_onnx_text(
        WRITTEN.replace("square = Pow(x, two)", "m = ReduceMean(x, last) c = Sub(x, m) square = Pow(c, two)").replace(
            "Div(x, root)", "Div(c, root)"
        )
    )
    assert LowerRmsNorm()(model).changed == 0


@pytest.mark.parametrize("text", [LAST, WRITTEN])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = lowered(text)
    before = ir.to_proto(model)
    assert LowerRmsNorm()(model).changed == 0
    assert ir.to_proto(model) == before
