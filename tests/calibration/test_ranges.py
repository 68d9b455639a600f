from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.ranges import measure_amax
from profiles.errors import GpusqError

TEXT = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,3] x, float[N,3] mask) => (float[N,2] y, float[N,3] unused)
    <float[3,2] w = {1, -2, 3, -4, 5, -6}>
    {
        h = MatMul(x, w)
        r = Relu(h)
        y = Neg(r)
        unused = Mul(x, mask)
    }
"""
W = np.array([[1, -2], [3, -4], [5, -6]], np.float32)
ROOTS = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N,40] x) => (float[N,40] z) { y = Sqrt(x) z = Exp(y) }
"""


def random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def largest(array: npt.NDArray[np.float32]) -> float:
    return float(np.abs(array).max())


@pytest.mark.parametrize("batch", [1, 4, 7, 100], ids=["one", "a last part of 2", "a last part of 3", "all at once"])
def test_agrees_with_numpy(batch: int) -> None:
    x = random(10, 3)
    found = measure_amax(ir.from_onnx_text(TEXT), ["y", "x", "h", "w"], {"x": x}, batch)
    assert list(found) == ["y", "x", "h", "w"]
    expected = {"x": largest(x), "w": 6.0, "h": largest(x @ W), "y": largest(np.maximum(x @ W, 0))}
    assert found == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)  # each opens a session
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 8))
def test_finds_the_largest_wherever_it_is(count: int, batch: int, place: int) -> None:
    x = np.ones((count, 3), np.float32)
    x[place % count, place % 3] = -8
    assert measure_amax(ir.from_onnx_text(TEXT), ["x"], {"x": x}, batch) == {"x": 8}


def test_a_model_with_a_fixed_batch_runs_at_that_one() -> None:
    model = ir.from_onnx_text(TEXT.replace("N,", "4,"))
    x = random(6, 3)
    assert measure_amax(model, ["x"], {"x": x}, batch=3) == pytest.approx({"x": largest(x)}, rel=1e-6)


def test_half_precision_is_measured_in_float32() -> None:
    model = ir.from_onnx_text(TEXT.replace("float[", "float16["))
    x = random(5, 3).astype(np.float16)
    assert measure_amax(model, ["x"], {"x": x}, batch=2) == {"x": float(np.abs(x).max())}


def test_needs_no_samples_for_inputs_that_nothing_measured_reads() -> None:
    measure_amax(ir.from_onnx_text(TEXT), ["y"], {"x": random(2, 3)}, batch=2)
    with pytest.raises(GpusqError, match="no samples for the input 'mask'"):
        measure_amax(ir.from_onnx_text(TEXT), ["unused"], {"x": random(2, 3)}, batch=2)


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_names_the_first_tensor_that_became_nan(place: int) -> None:
    x = np.ones((2, 40), np.float32)
    x[1, place] = -1
    with pytest.raises(GpusqError, match="'y' became NaN or infinite"):
        measure_amax(ir.from_onnx_text(ROOTS), ["z", "y", "x"], {"x": x}, batch=2)


def test_names_the_first_tensor_that_became_infinite() -> None:
    x = np.full((1, 40), 1e9, np.float32)
    with pytest.raises(GpusqError, match="'z' became NaN or infinite"):
        measure_amax(ir.from_onnx_text(ROOTS), ["z", "y", "x"], {"x": x}, batch=1)


def test_reads_a_file_with_external_data_and_changes_no_model(tmp_path: Path) -> None:
    model, x = ir.from_onnx_text(TEXT), random(4, 3)
    before = ir.to_proto(model)
    found = measure_amax(model, ["h"], {"x": x}, batch=2)
    assert ir.to_proto(model) == before
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    assert measure_amax(tmp_path / "m.onnx", ["h"], {"x": x}, batch=2) == found


@pytest.mark.parametrize("name", ["missing", "shape"])
def test_measures_float_tensors_only(name: str) -> None:
    model = ir.from_onnx_text(TEXT.replace("h = MatMul(x, w)", "shape = Shape(x) h = MatMul(x, w)"))
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.INT64)
    with pytest.raises(ValueError, match="no float tensor"):
        measure_amax(model, [name], {"x": random(1, 3)}, batch=1)


def test_nothing_asked_is_nothing_measured() -> None:
    assert measure_amax(ir.from_onnx_text(TEXT), [], {}, batch=1) == {}
