from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from deploy.emulate_bfloat16 import emulate_bfloat16, holds_bfloat16
from deploy.verify import session_of
from exporters.passes.type_floats import IoTypes, TypeFloats

Array = npt.NDArray[np.float32]
Run = Callable[..., Array]
BF16 = ir.DataType.BFLOAT16.numpy()
TEXT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float[4,2] w = {0.5, 0, 0, 0.25, 0, -1.7, -0.5, 0}, float[2] b = {0.3, -0.7}>
    { h = MatMul(x, w)  s = Add(h, b)  y = Sigmoid(s) }
"""


def rounded(array: Array) -> Array:
    return array.astype(BF16).astype(np.float32)


def typed(io_types: IoTypes = "keep") -> ir.Model:
    model = ir.from_onnx_text(TEXT)
    TypeFloats("bfloat16", io_types=io_types)(model)
    return model


def expected(x: Array) -> Array:
    w = rounded(np.array([[0.5, 0], [0, 0.25], [0, -1.7], [-0.5, 0]], np.float32))
    s = rounded(rounded(rounded(x) @ w) + rounded(np.array([0.3, -0.7], np.float32)))
    return rounded(np.float32(1) / (np.float32(1) + np.exp(-s, dtype=np.float32)))


@pytest.mark.parametrize("io_types", ["keep", "graph"])
def test_answers_with_the_numbers_of_bfloat16(io_types: IoTypes, tmp_path: Path) -> None:
    """As numpy rounds them; one in a hundred may be one step of bfloat16 off, for the order of a sum is open."""
    model = typed(io_types)
    assert holds_bfloat16(model)
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    x = np.random.default_rng(0).standard_normal((256, 4), np.float32)
    (found,) = session_of(tmp_path / "model.onnx")({"x": x})
    different = found != expected(x)
    assert different.mean() <= 0.01
    assert np.abs(np.asarray(found, np.float32) - expected(x)).max() <= 2**-8
    assert np.array_equal(rounded(np.asarray(found, np.float32)), found)


def test_a_graph_without_bfloat16_is_left_as_it_is() -> None:
    model = ir.from_onnx_text(TEXT)
    before = ir.to_proto(model)
    assert not holds_bfloat16(model)
    emulate_bfloat16(model)
    assert ir.to_proto(model) == before


def test_names_of_inputs_and_outputs_stay() -> None:
    model = typed("graph")
    emulate_bfloat16(model)
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    assert names == ["x", "y"]
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
