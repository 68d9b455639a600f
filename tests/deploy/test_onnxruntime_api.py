from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from deploy.onnxruntime_api import open_session
from deploy.timing.engine import open_engine, read_model
from tests.deploy.timing.small_models import save_model

QDQ_BEFORE_RESHAPE = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[2,8] x) => (float[2,4,1] y)
    <float s = {0.1}, int8 z = {0}, int64[3] shape = {2, 4, 2}, float[2,1] w = {1, 2}>
    {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        r = Reshape(d, shape)
        y = MatMul(r, w)
    }
"""


def test_opens_a_graph_that_onnxruntime_breaks_by_moving_its_quantizers(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(QDQ_BEFORE_RESHAPE), tmp_path / "model.onnx")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="does not match y_zero_point"):
        onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = open_session(tmp_path / "model.onnx").run(None, {"x": np.ones((2, 8), np.float32)})[0]
    assert np.allclose(found, 3.0, rtol=1e-6)


def test_a_broken_graph_stays_an_error(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }'
    model = ir.from_onnx_text(text)
    next(iter(model.graph)).op_type = "NoSuchOperator"
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph, match="NoSuchOperator"):
        open_session(tmp_path / "model.onnx")


def test_no_thread_works_on_after_a_call(tmp_path: Path) -> None:
    """A thread that spins uses 6 to 14 ms of processor time in these 20; a sleeping process a tenth of one."""
    engine = open_engine(read_model(save_model(tmp_path / "model.onnx", 24, 160)), 1)
    spent = []
    for _ in range(5):
        engine.call()
        start = time.process_time()
        time.sleep(0.02)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.002
