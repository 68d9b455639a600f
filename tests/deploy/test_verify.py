from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.rows import all_of
from calibration.samples import InputSpec, Samples, random_samples
from deploy.manifest import Interval
from deploy.verify import summary, verify

DOUBLE = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 4] x) => (float[batch, 4] y) { y = Add(x, x) }"""
SPECS = {"x": InputSpec(shape=(4,), dtype="float32", scale=1.0, mean=0.0, std=1.0)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(DOUBLE), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def samples() -> Samples:
    return random_samples(SPECS, 250)


def test_model_that_is_the_student_agrees_wholly(model: Path, samples: Samples) -> None:
    found = verify(model, 2 * all_of(samples.inputs["x"]), samples)
    assert (found.count, found.agreement, found.max_abs_difference) == (250, 1.0, 0.0)
    assert (found.labelled, found.student_top1, found.onnx_top1) == (False, None, None)
    assert "no labels" in summary(found)


def test_one_sample_that_differs_is_counted(model: Path, samples: Samples) -> None:
    reference = 2 * all_of(samples.inputs["x"])
    reference[7] = -reference[7]
    found = verify(model, reference, samples)
    assert found.agreement == pytest.approx(249 / 250)
    assert found.max_abs_difference == pytest.approx(float(2 * np.abs(reference[7]).max()))


def test_accuracies_are_those_of_each_against_the_labels(model: Path, samples: Samples) -> None:
    logits = 2 * all_of(samples.inputs["x"])
    labels = logits.argmax(1)
    labels[:25] = (labels[:25] + 1) % 4
    labelled = Samples(samples.inputs, labels, "labelled", samples.sha256)
    found = verify(model, -logits, labelled)
    assert found.onnx_top1 == pytest.approx(0.9)
    assert found.student_top1 == pytest.approx(float(np.mean((-logits).argmax(1) == labels)))
    assert "top-1 90.0 %" in summary(found)


def test_interval_of_the_drop_is_exact(model: Path, samples: Samples) -> None:
    """30 samples that only the student gets right, 10 that only the model does: 30 of 40 lost, Clopper-Pearson."""
    logits = 2 * all_of(samples.inputs["x"])
    labels = logits.argmax(1)
    reference = logits.copy()
    reference[:10] = -reference[:10]
    labels[10:40] = (-logits).argmax(1)[10:40]
    reference[10:40] = -reference[10:40]
    found = verify(model, reference, Samples(samples.inputs, labels, "labelled", samples.sha256))
    assert found.drop is not None
    assert found.drop.value == pytest.approx((30 - 10) / 250)
    assert found.drop.low == pytest.approx(40 * (2 * 0.58803 - 1) / 250, abs=1e-4)
    assert found.drop.high == pytest.approx(40 * (2 * 0.87307 - 1) / 250, abs=1e-4)


def test_nothing_lost_where_both_are_right_on_the_same(model: Path, samples: Samples) -> None:
    logits = 2 * all_of(samples.inputs["x"])
    found = verify(model, logits, Samples(samples.inputs, logits.argmax(1), "labelled", samples.sha256))
    assert found.drop == Interval(value=0.0, low=0.0, high=0.0)


def test_float16_overflow_that_onnxruntime_hides_is_found(tmp_path: Path, samples: Samples) -> None:
    """1,000 · 100 is beyond float16. onnxruntime's CPU computes it in float32, multiplies by 0.001 and gives 100.

    ONNX text writes float16 as bits: 25552 is 1,000 and 5145 is 0.001.
    """
    text = """<ir_version: 9, opset_import: ["": 20]>
    g (float[batch, 4] x) => (float[batch, 4] y) <float16 up = {25552}, float16 down = {5145}> {
        h = Cast<to=10>(x)  big = Mul(h, up)  safe = Relu(big)  small = Mul(safe, down)  y = Cast<to=1>(small)
    }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "half.onnx")
    large = Samples({"x": np.full((3, 4), 100, np.float32)}, None, "large", samples.sha256)
    found = verify(tmp_path / "half.onnx", np.full((3, 4), 100, np.float32), large)
    assert found.max_abs_difference < 0.1
    assert found.float16 is not None
    assert (found.float16.finite, found.float16.max_abs_difference) == (False, None)


def test_float32_graph_needs_no_float16_check(model: Path, samples: Samples) -> None:
    assert verify(model, all_of(samples.inputs["x"]), samples).float16 is None


def test_tells_the_share_that_is_done(model: Path, samples: Samples) -> None:
    shares: list[float] = []
    verify(model, all_of(samples.inputs["x"]), samples, progress=shares.append)
    assert shares == [0.4, 0.8, 1.0]
