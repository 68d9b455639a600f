from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from deploy.onnxruntime_api import open_session
from exporters.save_onnx import save_onnx

MODEL = """
    <ir_version: 10, opset_import: ["": 21], metadata_props: ["kept": "yes"]>
    g (float[N,4] x) => (float[N,2] y)
    <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {0.5, -0.5}, float s = {2}>
    { t = MatMul(x, w) u = Mul(t, s) y = Add(u, b) }
"""


def same_tensors(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    first, second = ({t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (one, other))
    same = [
        first[name].tobytes() == second[name].tobytes() and first[name].dtype == second[name].dtype for name in first
    ]
    return first.keys() == second.keys() and all(same)


def test_writes_what_onnx_writes(tmp_path: Path) -> None:
    model = ir.from_onnx_text(MODEL)
    assert save_onnx(model, tmp_path / "ours.onnx") == (tmp_path / "ours.onnx",)
    ir.save(model, tmp_path / "theirs.onnx")
    ours, theirs = onnx.load(tmp_path / "ours.onnx"), onnx.load(tmp_path / "theirs.onnx")
    onnx.checker.check_model(ours, full_check=True)
    assert same_tensors(ours, theirs)
    for proto in (ours, theirs):
        proto.graph.ClearField("initializer")
        proto.graph.ClearField("value_info")
    assert ours == theirs
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    w = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    found = open_session(tmp_path / "ours.onnx").run(None, {"x": x})[0]
    assert np.array_equal(found, x @ w * 2 + np.array([0.5, -0.5], np.float32))


def test_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = ir.from_onnx_text(MODEL)
    before = ir.to_proto(model)
    save_onnx(model, tmp_path / "model.onnx")
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.int64, np.bool_, ml_dtypes.int4, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_keeps_every_type_and_shape(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    model = ir.from_onnx_text(MODEL)
    array: npt.NDArray[np.generic] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    tensor = ir.tensor(array, name="extra")
    model.graph.register_initializer(ir.Value(name="extra", const_value=tensor))
    save_onnx(model, tmp_path / "model.onnx")
    held = {
        value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(tmp_path / "model.onnx").graph.initializer
    }
    assert (held["extra"].dtype, held["extra"].shape) == (array.dtype, shape)
    assert held["extra"].tobytes() == array.tobytes()


def test_what_is_too_large_for_one_file_gets_external_data(tmp_path: Path) -> None:
    model = ir.from_onnx_text(MODEL)
    wide = ir.tensor(np.ones((200, 200), np.float32), name="wide")
    model.graph.register_initializer(ir.Value(name="wide", const_value=wide))
    files = save_onnx(model, tmp_path / "model.onnx", limit_bytes=100_000)
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < 10_000
    assert same_tensors(onnx.load(tmp_path / "model.onnx"), ir.to_proto(model))


def test_external_data_that_was_read_can_be_written_again(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(MODEL), tmp_path / "first.onnx", external_data="first.data", size_threshold_bytes=0)
    save_onnx(ir.load(tmp_path / "first.onnx"), tmp_path / "second.onnx")
    assert same_tensors(onnx.load(tmp_path / "first.onnx"), onnx.load(tmp_path / "second.onnx"))
