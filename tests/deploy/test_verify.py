from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.samples import InputSpec, Samples, random_samples
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
    found = verify(model, 2 * samples.inputs["x"], samples)
    assert (found.count, found.agreement, found.max_abs_difference) == (250, 1.0, 0.0)
    assert (found.labelled, found.student_top1, found.onnx_top1) == (False, None, None)
    assert "no labels" in summary(found)


def test_one_sample_that_differs_is_counted(model: Path, samples: Samples) -> None:
    reference = 2 * samples.inputs["x"]
    reference[7] = -reference[7]
    found = verify(model, reference, samples)
    assert found.agreement == pytest.approx(249 / 250)
    assert found.max_abs_difference == pytest.approx(float(2 * np.abs(reference[7]).max()))


def test_accuracies_are_those_of_each_against_the_labels(model: Path, samples: Samples) -> None:
    logits = 2 * samples.inputs["x"]
    labels = logits.argmax(1)
    labels[:25] = (labels[:25] + 1) % 4
    labelled = Samples(samples.inputs, labels, "labelled", samples.sha256)
    found = verify(model, -logits, labelled)
    assert found.onnx_top1 == pytest.approx(0.9)
    assert found.student_top1 == pytest.approx(float(np.mean((-logits).argmax(1) == labels)))
    assert "top-1 90.0%" in summary(found)


def test_tells_the_share_that_is_done(model: Path, samples: Samples) -> None:
    shares: list[float] = []
    verify(model, samples.inputs["x"], samples, progress=shares.append)
    assert shares == [0.4, 0.8, 1.0]
