from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.module_names import MODULE_KEY
from exporters.passes.fold_constants import FoldConstants

Run = Callable[..., npt.NDArray[np.float32]]

# A shape computed from a weight, and a mask computed from nothing.
COMPUTED = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,2,3] y)
    <float[4,6] w = {1, -2, 3, -4, 5, -6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6},
     int64 one = {1}, int64[1] axis = {0}, int64[1] two = {2}, int64[1] zero = {0}, float[3] m = {1, 2, 3}>
    {
        [shape] s = Shape(w)
        [pick] n = Gather(s, one)
        [half] h = Div(n, two)
        [sizes] sizes = Concat<axis=0>(zero, two, h)
        [negative] mask = Neg(m)
        [fc] p = MatMul(x, w)
        [heads] r = Reshape(p, sizes)
        [masked] y = Add(r, mask)
    }
"""
QUANTIZED = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,2] x) => (float[N,2] y) <float s = {0.5}, int8 z = {0}, float[2,2] w = {1, 2, 3, 4}>
    {
        q = QuantizeLinear(w, s, z)
        d = DequantizeLinear(q, s, z)
        y = MatMul(x, d)
    }
"""
BRANCH = """
    <ir_version: 8, opset_import: ["": 17]>
    g (bool c, float[N,2] x) => (float[N,2] y) <float[2] a = {1, 2}>
    {
        b = Neg(a)
        y = If (c) <
            then_branch = t () => (float[N,2] p) { p = Add(x, b) },
            else_branch = e () => (float[N,2] q) { q = Mul(x, a) }
        >
    }
"""


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_what_depends_on_no_input_becomes_a_constant(run: Run) -> None:
    model, x = ir.from_onnx_text(COMPUTED), np.random.default_rng(0).standard_normal((3, 4), np.float32)
    before = run(model, x=x)
    assert FoldConstants()(model).changed == 5
    assert op_types(model) == ["MatMul", "Reshape", "Add"]
    assert np.array_equal(run(model, x=x), before)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_types_and_shapes_are_inferred() -> None:
    model = ir.from_onnx_text(COMPUTED)
    FoldConstants()(model)
    reshaped = next(node for node in model.graph if node.name == "heads").outputs[0]
    assert reshaped.dtype == ir.DataType.FLOAT
    assert reshaped.shape is not None
    assert list(reshaped.shape)[1:] == [2, 3]


def test_names_and_modules_stay_and_nothing_is_added_to_the_metadata() -> None:
    model = ir.from_onnx_text(COMPUTED)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = f"module.{node.name}"
    FoldConstants()(model)
    assert [node.name for node in model.graph] == ["fc", "heads", "masked"]
    assert [dict(node.metadata_props) for node in model.graph] == [
        {MODULE_KEY: f"module.{name}"} for name in ("fc", "heads", "masked")
    ]
    assert not any(value.metadata_props for value in model.graph.initializers.values())


def test_a_weight_above_the_limit_is_not_folded(tmp_path: Path) -> None:
    text = """
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] x) => (float[N,6] y) <float[6,4] w = {WEIGHT}>
        { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }
    """.replace("WEIGHT", ", ".join(map(str, range(24))))
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=64)
    model = ir.load(tmp_path / "m.onnx")
    assert FoldConstants(limit=23)(model).changed == 0
    assert op_types(model) == ["Transpose", "MatMul"]


@pytest.mark.parametrize(("limit", "left"), [(24, ["MatMul"]), (23, ["Neg", "MatMul"])])
def test_the_limit_counts_elements(limit: int, left: list[str]) -> None:
    model = ir.from_onnx_text(
        COMPUTED.replace("[fc] p = MatMul(x, w)", "v = Neg(w) [fc] p = MatMul(x, v)")
        .replace("[heads] r = Reshape(p, sizes)", "")
        .replace("Add(r, mask)", "Identity(p)")
    )
    FoldConstants(limit)(model)
    assert op_types(model)[: len(left)] == left


def test_quantized_constants_stay() -> None:
    model = ir.from_onnx_text(QUANTIZED)
    assert FoldConstants()(model).changed == 0
    assert op_types(model) == ["QuantizeLinear", "DequantizeLinear", "MatMul"]


@pytest.mark.parametrize("condition", [True, False])
def test_control_flow_stays(condition: bool, run: Run) -> None:
    model, x = ir.from_onnx_text(BRANCH), np.ones((1, 2), np.float32)
    before = run(model, c=np.array(condition), x=x)
    FoldConstants()(model)
    assert op_types(model) == ["If"]
    assert np.array_equal(run(model, c=np.array(condition), x=x), before)


@pytest.mark.parametrize("text", [COMPUTED, QUANTIZED, BRANCH])
def test_a_second_run_changes_nothing(text: str) -> None:
    model = ir.from_onnx_text(text)
    FoldConstants()(model)
    before = ir.to_proto(model)
    assert FoldConstants()(model).changed == 0
    assert ir.to_proto(model) == before
