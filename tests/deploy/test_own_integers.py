from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from deploy.onnxruntime_api import open_session
from deploy.own_integers import with_own_integers

TWO_DQS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,4] y)
    <float s = {0.5}, int8 z = {0}, float[4] ws = {0.5, 0.25, 1, 2}, int8[4] wz = {0, 0, 0, 0},
     int8[4,4] w = {1, -2, 3, -4, 5, 6, 7, 8, -99, 100, 101, 120, 13, 14, 15, -116}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear<axis=1>(w, ws, wz)
        a = MatMul(xd, wd)
        vd = DequantizeLinear<axis=1>(w, ws, wz)
        b = MatMul(xd, vd)
        y = Add(a, b)
    }
"""
ONE_DQ = TWO_DQS.replace("        vd = DequantizeLinear<axis=1>(w, ws, wz)\n", "").replace("xd, vd", "xd, wd")
W = np.array([1, -2, 3, -4, 5, 6, 7, 8, -99, 100, 101, 120, 13, 14, 15, -116], np.float32).reshape(4, 4)


def saved(text: str, folder: Path) -> Path:
    ir.save(ir.from_onnx_text(text), folder / "given.onnx")
    return folder / "given.onnx"


@pytest.mark.parametrize("text", [TWO_DQS, ONE_DQ], ids=["two DQs", "one DQ"])
def test_products_that_share_integers_are_computed_exactly(text: str, tmp_path: Path) -> None:
    x = np.array([[0.5, -1, 1.5, 63.5]], np.float32)
    (found,) = open_session(saved(text, tmp_path)).run(None, {"x": x})
    np.testing.assert_array_equal(found, 2 * (x @ (W * np.array([0.5, 0.25, 1, 2], np.float32))))


def test_onnxruntime_cannot_load_them_as_they_are(tmp_path: Path) -> None:
    """If it can one day, the copy is needed no more."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    with pytest.raises(Exception, match="Attempt to replace the existing tensor"):
        onnxruntime.InferenceSession(saved(TWO_DQS, tmp_path), options)


@pytest.mark.parametrize("text", [TWO_DQS, ONE_DQ], ids=["two DQs", "one DQ"])
def test_the_copy_has_integers_for_each_product(text: str, tmp_path: Path) -> None:
    given = saved(text, tmp_path)
    before = given.read_bytes()
    copy = with_own_integers(given, tmp_path)
    assert copy is not None
    products = [node for node in ir.load(copy).graph if node.op_type == "MatMul"]
    makers = [node.inputs[1].producer() for node in products if node.inputs[1] is not None]
    assert len({maker.inputs[0] for maker in makers if maker is not None}) == 2
    assert with_own_integers(copy, tmp_path) is None
    assert given.read_bytes() == before
