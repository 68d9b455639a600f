from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest

from deploy import device_engine, environment, tensorrt_api
from deploy.build import build, summary
from deploy.build_options import BuildOptions
from deploy.bundle import hash_files
from deploy.cache import Cache
from deploy.device_engine import build_on_device
from deploy.finish import finish
from deploy.tensorrt_api import ShapeRange, build_engine
from profiles.device import load_device
from profiles.errors import GpusqError

MATMUL = """<ir_version: 10, opset_import: ["": 20]>
g (float16[batch, 16, 16] x) => (float16[batch, 16, 16] y) { y = MatMul(x, x) }"""
UNKNOWN = """<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
g (float16[batch, 16] x) => (float16[batch, 16] y) { y = com.microsoft.BiasGelu(x, x) }"""

needs_rtx = pytest.mark.skipif(not tensorrt_api.has_api("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
has_gpu = bool(environment.gpus())


def save(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    ir.save(ir.from_onnx_text(text), path)
    return path


@needs_rtx
def test_compiles_ahead_of_time_without_a_gpu_and_the_same_bytes_twice(tmp_path: Path) -> None:
    path = save(tmp_path, MATMUL)
    one, two = (
        build_engine(path, "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 2, 4)) for _ in range(2)
    )
    assert one.engine == two.engine
    assert any(message.startswith("Layers:") for message in one.log)
    assert one.runtime_version == tensorrt_api.versions()["tensorrt-rtx"]


@needs_rtx
def test_operator_that_the_parser_lacks_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"tensorrt-rtx cannot parse model\.onnx") as caught:
        build_engine(save(tmp_path, UNKNOWN), "tensorrt-rtx", compute_capability="SM80")
    assert caught.value.hint


@needs_rtx
def test_unknown_compute_capability_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="cannot compile for SM87"):
        build_engine(save(tmp_path, MATMUL), "tensorrt-rtx", compute_capability="SM87")


@pytest.mark.skipif(has_gpu, reason="this host has a GPU")
@pytest.mark.parametrize("profile", ["a100", "agx-orin"])
def test_device_engine_is_not_built_on_something_else(tmp_path: Path, profile: str) -> None:
    with pytest.raises(GpusqError, match="this host has no NVIDIA GPU") as caught:
        build_on_device(tmp_path, load_device(profile))
    assert "gpusq build" in caught.value.hint


@pytest.mark.parametrize(
    ("profile", "gpu", "capability"),
    [
        ("a100", "NVIDIA L4", "8.9"),
        ("a100", "NVIDIA A30", "8.0"),
        ("l4", "NVIDIA L40S", "8.9"),
        ("agx-orin", "NVIDIA Jetson Orin Nano Developer Kit", "8.7"),
    ],
)
def test_device_engine_is_not_built_on_another_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, gpu: str, capability: str
) -> None:
    monkeypatch.setattr(device_engine, "gpus", lambda: (environment.Gpu(gpu, capability, "580.65"),))
    with pytest.raises(GpusqError, match=f"and the GPU of this host is {gpu}"):
        build_on_device(tmp_path, load_device(profile))


def test_without_the_compiler_the_plan_is_missing_and_the_bundle_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "has_api", lambda runtime: False)
    save(tmp_path, MATMUL)
    result = build(tmp_path, load_device("a100"), name="out/a100")
    assert (result.engines, result.plan) == ((), None)
    assert [missing.what for missing in result.missing] == ["TensorRT engine", "compiled plan"]
    assert result.missing[1].how == "pip install tensorrt-rtx"
    assert "TensorRT engine missing" in summary(result)


@pytest.mark.skipif(has_gpu, reason="this host has a GPU")
def test_finishing_a_bundle_off_its_device_changes_nothing(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "a100"
    shutil.copytree(bundles["a100"], bundle)
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    with pytest.raises(GpusqError, match="the TensorRT engine cannot be built here"):
        finish(bundle)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    assert list(tmp_path.iterdir()) == [bundle]


def test_finishing_a_finished_bundle_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(GpusqError, match="has its engine already"):
        finish(bundles["cpu"])


def test_finishing_puts_the_engine_into_manifest_and_report(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT cannot run here; TensorRT-RTX stands in for it behind the same adapter, everything else is real."""
    real = tensorrt_api.build_engine
    monkeypatch.setattr(device_engine, "gpus", lambda: (environment.Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580.65"),))
    monkeypatch.setattr(tensorrt_api, "has_api", lambda runtime: True)
    monkeypatch.setattr(tensorrt_api, "versions", lambda: {"tensorrt": "10.3.0"})
    monkeypatch.setattr(
        tensorrt_api,
        "build_engine",
        lambda model, runtime, **asked: real(model, "tensorrt-rtx", compute_capability="SM80", **asked),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = tmp_path / "a100"
    shutil.copytree(bundles["a100"], bundle)
    cache = Cache(tmp_path / "built")
    shutil.copytree(bundle, tmp_path / "again" / "a100")
    manifest = finish(bundle, options=BuildOptions(sparse=False), cache=cache)
    again = finish(tmp_path / "again" / "a100", options=BuildOptions(sparse=False), cache=cache)
    assert [answer.hit for answer in cache.answers] == [False, True]
    assert again.files["engine.tensorrt"] == manifest.files["engine.tensorrt"]
    assert again.engines == manifest.engines
    assert manifest.missing == ()
    assert [engine.file for engine in manifest.engines] == ["engine.sm80.rtx", "engine.tensorrt"]
    assert (bundle / "engine.tensorrt").stat().st_size == manifest.files["engine.tensorrt"].bytes
    assert manifest.engines[1].built_on == "NVIDIA A100-SXM4-80GB, driver or Jetson Linux 580.65"
    assert manifest.engines[1].sparse_chosen is None
    assert manifest.engines[1].options == {"sparse": False}
    assert "Layers:" in (bundle / "engine.tensorrt.log").read_text()
    assert "engine.tensorrt" in (bundle / "report.md").read_text()
    assert manifest.files == hash_files(bundle)
