from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.raise_opset import RaiseOpset

Run = Callable[..., npt.NDArray[np.float32]]

OLD = f"""
    <ir_version: 7, opset_import: ["": 14]>
    g (float[batch,4] x) => (float[batch,1] y)
    <float[4,300] w = {{{", ".join(f"{number % 11 - 5}" for number in range(1200))}}}>
    {{
        [fc] h = MatMul(x, w)
        [mean] y = ReduceMean<axes=[-1]>(h)
    }}
"""
BRANCH = """
    <ir_version: 7, opset_import: ["": 14]>
    g (bool c, float[N,2] x) => (float[N,2] y)
    {
        y = If (c) <
            then_branch = t () => (float[N,2] p) { p = Relu(x) },
            else_branch = e () => (float[N,2] q) { q = Neg(x) }
        >
    }
"""
UNKNOWN = """
    <ir_version: 7, opset_import: ["": 14]>
    g (float[N,2] x) => (float[N,2] y) { h = Secret(x) y = Relu(h) }
"""
CUSTOM = """
    <ir_version: 7, opset_import: ["": 14, "com.example": 1]>
    g (float[N,2] x) => (float[N,2] y) { h = com.example.Secret<depth=3>(x) y = Relu(h) }
"""
X = np.random.default_rng(0).standard_normal((3, 4), np.float32)


@pytest.mark.parametrize("opset", [17, 20, 23])
def test_raises_with_the_same_numbers(opset: int, run: Run) -> None:
    model = ir.from_onnx_text(OLD)
    expected = run(model, x=X)
    assert RaiseOpset(opset)(model).changed == 1
    assert model.opset_imports[""] == opset
    assert np.array_equal(run(model, x=X), expected)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_an_attribute_that_became_an_input_is_a_constant() -> None:
    model = ir.from_onnx_text(OLD)
    RaiseOpset(20)(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "ReduceMean"]
    axes = model.graph[1].inputs[1]
    assert axes is not None
    assert axes.const_value is not None
    assert axes.const_value.numpy().tolist() == [-1]


def test_keeps_names_modules_metadata_and_what_is_known_of_values() -> None:
    model = ir.from_onnx_text(OLD)
    model.metadata_props["who"] = "me"
    model.graph.metadata_props["where"] = "here"
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = f"module.{node.name}"
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph[0].outputs[0].shape = ir.Shape(["batch", 300])
    RaiseOpset(20)(model)
    assert [(node.name, node.metadata_props[MODULE_KEY]) for node in model.graph] == [
        ("fc", "module.fc"),
        ("mean", "module.mean"),
    ]
    assert (model.metadata_props["who"], model.graph.metadata_props["where"]) == ("me", "here")
    assert model.graph[0].outputs[0].shape == ir.Shape(["batch", 300])
    assert [(value.name, value.shape) for value in model.graph.inputs] == [("x", ir.Shape(["batch", 4]))]
    assert [(value.name, value.shape) for value in model.graph.outputs] == [("y", ir.Shape(["batch", 1]))]


def test_no_weight_is_read(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(OLD), tmp_path / "m.onnx", external_data="m.data")
    model = ir.load(tmp_path / "m.onnx")
    weight = model.graph.initializers["w"].const_value
    (tmp_path / "m.data").unlink()
    RaiseOpset(20)(model)
    assert model.graph.initializers["w"].const_value is weight


@pytest.mark.parametrize(("text", "why"), [(BRANCH, "control flow"), (UNKNOWN, "cannot raise it")])
def test_says_why_it_leaves_one_alone(text: str, why: str) -> None:
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    outcome = RaiseOpset(20)(model)
    assert outcome.changed == 0
    assert why in outcome.left_alone[0].why
    assert ir.to_proto(model) == before


def test_an_operator_of_another_domain_stays_as_it_is() -> None:
    model = ir.from_onnx_text(CUSTOM)
    assert RaiseOpset(20)(model).changed == 1
    assert model.opset_imports == {"": 20, "com.example": 1}
    secret = model.graph[0]
    assert (secret.domain, secret.op_type, secret.attributes["depth"].as_int()) == ("com.example", "Secret", 3)


def test_a_second_run_and_a_lower_opset_change_nothing() -> None:
    model = ir.from_onnx_text(OLD)
    RaiseOpset(20)(model)
    before = ir.to_proto(model)
    assert RaiseOpset(20)(model).changed == 0
    assert RaiseOpset(17)(model).changed == 0
    assert ir.to_proto(model) == before
