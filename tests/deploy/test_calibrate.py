from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from calibration.histogram import Histogram
from calibration.methods import Method
from calibration.resume import Resume
from calibration.samples import SampleSource
from deploy.calibrate import calibrate
from deploy.cli import main
from deploy.conversion import convert
from deploy.scales_file import read_scales
from deploy.surgery import operate
from exporters.improvement import Improvement
from profiles.errors import GpusqError
from students.fashion_vit.sample import calibration_images, student_path, teacher_path

FEW = SampleSource(str(calibration_images()), count=40)
MODEL = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch, 64] x, float[64, 64] w1, float[64, 64] w2) => (float[batch, 64] y)
    { a = MatMul(x, w1) b = Relu(a) y = MatMul(b, w2) }"""


def two_layers(folder: Path, seed: int = 0, text: str = MODEL) -> Path:
    model, random = ir.from_onnx_text(text), np.random.default_rng(seed)
    for value in [value for value in model.graph.inputs if value.name != "x"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(random.standard_normal((64, 64)).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    ir.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def samples(folder: Path, count: int = 40) -> Path:
    x = np.random.default_rng(1).standard_normal((count, 64)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    return folder / "x.npz"


SLOWLY = """
import sys, time
import deploy.ranging
from calibration.methods import Method
from calibration.resume import Resume

class Slow(Resume):
    def save(self, *counted):
        self.every_s = 0
        super().save(*counted)
        time.sleep(0.05)

deploy.ranging.Resume = Slow
"""
CALIBRATE = """
from deploy.calibrate import calibrate
calibrate(*sys.argv[1:], method=Method("mse"))
"""
CONVERT = """
from deploy.conversion import convert
model, out, data = sys.argv[1:]
convert(model, profiles=["cpu"], out=out, placement="w8a8-linear", data=data)
"""
METHODS = [Method("max"), Method("percentile", 99.9), Method("entropy"), Method("mse")]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scales_of_a_file_make_the_graph_that_the_samples_make(method: Method, tmp_path: Path) -> None:
    model, data, scales = two_layers(tmp_path), samples(tmp_path), tmp_path / "s.json"
    calibrate(model, scales, data, method=method)
    operate(model, tmp_path / "a.onnx", profile="cpu", placement="w8a8-linear", scales=scales)
    operate(model, tmp_path / "b.onnx", profile="cpu", placement="w8a8-linear", data=data, method=method)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_scales_go_together_with_what_leaves_activations_as_they_are(tmp_path: Path) -> None:
    model, data, scales = two_layers(tmp_path), samples(tmp_path), tmp_path / "s.json"
    calibrate(model, scales, data)
    improve: tuple[Improvement, ...] = ("mse-weights", "error-feedback", "bias-correction")
    asked = functools.partial(operate, model, profile="cpu", placement="w8a8-linear", method=Method(), improve=improve)
    asked(tmp_path / "a.onnx", scales=scales, data=data)
    asked(tmp_path / "b.onnx", data=data)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    operate(model, tmp_path / "c.onnx", profile="cpu", placement="w8a8-linear", scales=scales, improve=("mse-weights",))


@pytest.mark.parametrize(
    ("improve", "message", "hint"),
    [
        ("smooth-quant", "smooth-quant changes the ranges that .*s.json holds", "leave out --scales"),
        ("auto", "auto changes the ranges that .*s.json holds", "leave out --scales"),
        ("equalize", "equalize changes the ranges that .*s.json holds", "leave out --scales"),
        ("error-feedback", "error-feedback looks at what the model does on samples", "beside --scales"),
    ],
)
def test_scales_and_an_improvement_that_needs_more_are_refused(
    improve: Improvement, message: str, hint: str, tmp_path: Path
) -> None:
    model, scales = two_layers(tmp_path), tmp_path / "s.json"
    calibrate(model, scales, samples(tmp_path))
    with pytest.raises(GpusqError, match=message) as caught:
        operate(model, tmp_path / "o", profile="cpu", placement="w8a8-linear", scales=scales, improve=(improve,))
    assert hint in caught.value.hint


def test_tells_what_was_measured_on_what(tmp_path: Path) -> None:
    done = calibrate(teacher_path(), tmp_path / "scales.json", FEW, method=Method("mse"))
    assert read_scales(tmp_path / "scales.json") == done.scales
    assert (done.scales.samples.count, done.scales.samples.available, done.scales.method) == (40, 256, "mse")
    assert all(0 < tensor.amax <= tensor.largest for tensor in done.scales.tensors)
    assert all(tensor.scale == pytest.approx(tensor.amax / 127) for tensor in done.scales.tensors)
    assert "25 scales by mse" in done.to_text()


def test_compares_the_ranges_with_those_of_other_samples(tmp_path: Path) -> None:
    model = two_layers(tmp_path)
    x = np.load(samples(tmp_path))["x"]
    np.savez(tmp_path / "half.npz", x=x / 2)
    done = calibrate(model, tmp_path / "s.json", tmp_path / "half.npz", against=tmp_path / "x.npz")
    assert done.against is not None
    assert set(done.against.ratios.values()) == {0.5}
    assert json.loads(done.model_dump_json())["against"]["median_ratio"] == 0.5
    assert "ranges of half.npz are 0.50 × those of x.npz" in done.to_text()


def test_a_student_that_brings_its_scales_has_nothing_to_calibrate(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="no activation without a scale"):
        calibrate(student_path(), tmp_path / "scales.json", FEW)
    assert list(tmp_path.iterdir()) == []


def test_scales_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    calibrate(two_layers(tmp_path), tmp_path / "s.json", samples(tmp_path))
    other = two_layers(tmp_path, seed=2)
    with pytest.raises(GpusqError, match="is of another checkpoint"):
        operate(other, tmp_path / "o.onnx", profile="cpu", placement="w8a8-linear", scales=tmp_path / "s.json")


def test_scales_of_another_placement_say_which_one_they_are_of(tmp_path: Path) -> None:
    calibrate(teacher_path(), tmp_path / "scales.json", FEW)
    with pytest.raises(GpusqError, match="18 of 43 ranges are not in the scales") as caught:
        operate(teacher_path(), tmp_path / "o", profile="cpu", placement="w8a8-mha", scales=tmp_path / "scales.json")
    assert "placement w8a8-linear" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "model: field required"), ("\x00", "invalid JSON"), ('{"schema": 1, "x": 2}', "field required")],
)
def test_a_file_that_holds_no_scales_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(GpusqError, match=message):
        read_scales(tmp_path / "s.json")


def test_scales_of_a_newer_release_are_refused(tmp_path: Path) -> None:
    calibrate(two_layers(tmp_path), tmp_path / "s.json", samples(tmp_path))
    (tmp_path / "s.json").write_text((tmp_path / "s.json").read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(GpusqError, match="has schema 2"):
        read_scales(tmp_path / "s.json")


def kill_while_it_counts(script: str, partial: Path, *arguments: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOWLY + script, *map(str, arguments)]) as process:
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert partial.exists()


def test_killed_and_run_again_it_writes_the_same_file(tmp_path: Path) -> None:
    model, data = two_layers(tmp_path), samples(tmp_path, count=400)
    partial = tmp_path / "s.json.partial"
    kill_while_it_counts(CALIBRATE, partial, model, tmp_path / "s.json", data)
    assert not (tmp_path / "s.json").exists()
    calibrate(model, tmp_path / "s.json", data, method=Method("mse"))
    assert not partial.exists()
    again = calibrate(model, tmp_path / "t.json", data, method=Method("mse"))
    assert read_scales(tmp_path / "s.json") == again.scales


def test_a_conversion_that_was_killed_goes_on_and_makes_the_same_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = two_layers(tmp_path), samples(tmp_path, count=400)
    kill_while_it_counts(CONVERT, tmp_path / "a" / ".gpusq-partial", model, tmp_path / "a", data)
    begun: list[int] = []  # how many batches each measuring finds counted

    class Watched(Resume):
        def load(self, key: str, histograms: Mapping[str, Histogram]) -> int:
            begun.append(super().load(key, histograms))
            return begun[-1]

    monkeypatch.setattr("deploy.ranging.Resume", Watched)
    convert(model, profiles=["cpu"], out=tmp_path / "a", placement="w8a8-linear", data=data)
    operate(model, tmp_path / "b.onnx", profile="cpu", placement="w8a8-linear", data=data)
    assert begun[0] > 0
    assert begun[1] == 0
    assert (tmp_path / "a" / "cpu" / "model.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cpu"]


def test_an_error_leaves_nothing_of_what_was_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Often(Resume):
        def save(self, key: str, histograms: Mapping[str, Histogram], done: int) -> None:
            self.every_s = 0
            super().save(key, histograms, done)
            assert self.file.exists()

    monkeypatch.setattr("deploy.ranging.Resume", Often)
    model = two_layers(tmp_path, text=MODEL.replace("b = Relu(a)", "c = Exp(a) b = Sub(c, c)"))
    np.savez(tmp_path / "x.npz", x=np.repeat(np.array([[0.0], [100.0]], np.float32), 64, axis=1).repeat(20, axis=0))
    with pytest.raises(GpusqError, match="became NaN or infinite"):
        calibrate(model, tmp_path / "s.json", tmp_path / "x.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "x.npz"]


def test_the_command_writes_the_file_and_says_so(tmp_path: Path) -> None:
    model, data = two_layers(tmp_path), samples(tmp_path)
    out = tmp_path / "new" / "s.json"
    method = ["--method", "percentile", "--percentile", "99.9"]
    asked = ["calibrate", str(model), "--data", str(data), *method, "-o", str(out)]
    said = CliRunner().invoke(main, asked)
    assert said.exit_code == 0, said.output
    assert "2 scales by percentile 99.9, 2 of them clip" in said.output
    printed = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert printed["scales"] == json.loads(out.read_text())


def test_the_command_wants_samples(tmp_path: Path) -> None:
    said = CliRunner().invoke(main, ["calibrate", str(two_layers(tmp_path)), "-o", str(tmp_path / "s.json")])
    assert said.exit_code == 2
    assert "--data" in said.output


def test_names_the_layer_that_makes_infinity(tmp_path: Path) -> None:
    model = two_layers(tmp_path, text=MODEL.replace("b = Relu(a)", "c = Exp(a) b = Sub(c, c)"))
    np.savez(tmp_path / "x.npz", x=np.full((40, 64), 100, np.float32))
    with pytest.raises(GpusqError, match="'c' became NaN or infinite in Exp"):
        calibrate(model, tmp_path / "s.json", tmp_path / "x.npz")
