from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from deploy import environment, tensorrt_engine
from deploy.cuda import Cuda, open_cuda
from deploy.engine import OnnxRuntimeEngine, open_engine, unfit
from deploy.manifest import Engine, Manifest, read_manifest
from profiles.errors import GpusqError
from tests.deploy.host_cuda import HostCuda, doubling_api

TEXT = '<ir_version: 10, opset_import: ["": 20]> g (float16[N,4] x) => (float16[N,4] y) { y = Add(x, x) }'
GPU = environment.Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580.65")


def test_onnxruntime_takes_float32_where_the_model_has_float16(tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(TEXT), tmp_path / "model.onnx")
    engine = OnnxRuntimeEngine(tmp_path / "model.onnx")
    assert (engine.inputs, engine.outputs) == (("x",), ("y",))
    answer = engine.infer({"x": np.ones((2, 4), np.float32)})
    np.testing.assert_array_equal(answer["y"], np.full((2, 4), 2, np.float16))
    engine.close()


def test_the_engine_of_a_bundle_runs(bundles: dict[str, Path]) -> None:
    engine = open_engine(bundles["cpu"])
    (name,) = engine.inputs
    answer = engine.infer({name: np.zeros((2, 1, 28, 28), np.float32)})
    assert answer[engine.outputs[0]].shape == (2, 10)


def test_a_flipped_bit_is_not_loaded(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "cpu"
    shutil.copytree(bundles["cpu"], bundle)
    content = bytearray((bundle / "engine.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "engine.onnx").write_bytes(content)
    with pytest.raises(GpusqError, match="is not the file that the manifest names"):
        open_engine(bundle)


def test_a_runtime_without_an_engine_is_one_error(bundles: dict[str, Path]) -> None:
    with pytest.raises(GpusqError, match="has no engine of tensorrt"):
        open_engine(bundles["cpu"], "tensorrt")


@pytest.mark.skipif(bool(environment.gpus()), reason="this host has a GPU")
def test_an_engine_of_a_gpu_is_refused_without_one(bundles: dict[str, Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(GpusqError, match="not for this host: it has no NVIDIA GPU"):
        open_engine(bundles["a100"])


@pytest.mark.parametrize(
    ("changes", "gpu", "why"),
    [
        ({}, GPU, ""),
        ({"runtime_version": "1.0"}, GPU, "1.0 built it, and here is"),
        ({"target": "SM87"}, GPU, "it is for SM87, and NVIDIA A100-SXM4-80GB is SM80"),
        ({"built_on": "NVIDIA A100-SXM4-80GB, driver 1"}, GPU, ""),
        ({"built_on": "NVIDIA A100-PCIE-40GB, driver 1"}, GPU, "it was built on NVIDIA A100-PCIE-40GB"),
    ],
)
def test_version_and_device_must_fit(
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    gpu: environment.Gpu,
    why: str,
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(environment, "gpus", lambda: (gpu,))
    manifest = read_manifest(bundles["a100"])
    entry = manifest.engines[0].model_copy(update=changes)
    found = unfit(entry, manifest)
    assert why in found
    assert bool(why) == bool(found)


def test_an_optimized_model_stays_on_its_processor(bundles: dict[str, Path]) -> None:
    manifest: Manifest = read_manifest(bundles["cpu"])
    entry: Engine = manifest.engines[0]
    assert unfit(entry, manifest) == ""
    other = manifest.model_copy(update={"host": {**manifest.host, "processor": "another"}})
    assert "it was optimized on another" in unfit(entry, other)


@pytest.mark.skipif(bool(environment.gpus()), reason="this host has a GPU")
def test_without_cuda_one_error_says_what_to_do() -> None:
    """Without a package for CUDA it names both; with one, CUDA's own word for what is missing."""
    with pytest.raises(GpusqError, match=r"cuda-bindings or PyCUDA|CUDA: cudaError") as caught:
        open_cuda()
    assert caught.value.hint


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doubling_api()
    monkeypatch.setattr(tensorrt_engine, "import_api", lambda runtime: found)


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize("has_graphs", [True, False])
def test_buffers_grow_and_graphs_end_with_their_shapes(has_graphs: bool) -> None:
    cuda = HostCuda(has_graphs=has_graphs)
    as_protocol: Cuda = cuda
    engine = tensorrt_engine.TensorRtEngine(b"good", "tensorrt", as_protocol)
    for batch in (2, 2, 2, 5, 5, 1, 1):
        x = np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)
        np.testing.assert_array_equal(engine.infer({"x": x})["y"], 2 * x)
    assert cuda.captured == (3 if has_graphs else 0)
    assert len(cuda.held) == 2
    engine.close()
    assert cuda.held == {}


@pytest.mark.usefixtures("api")
def test_what_the_runtime_does_not_load_or_take_is_one_error() -> None:
    with pytest.raises(GpusqError, match="does not load the engine"):
        tensorrt_engine.TensorRtEngine(b"bad", "tensorrt", HostCuda(has_graphs=False))
    engine = tensorrt_engine.TensorRtEngine(b"good", "tensorrt", HostCuda(has_graphs=False))
    with pytest.raises(GpusqError, match="takes no"):
        engine.infer({"x": np.zeros(4, np.float32)})


def test_each_request_gets_the_optimization_profile_for_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doubling_api(((1, 4), (1, 4), (1, 4)), ((2, 4), (8, 4), (32, 4)))
    monkeypatch.setattr(tensorrt_engine, "import_api", lambda runtime: found)
    engine = tensorrt_engine.TensorRtEngine(b"good", "tensorrt", HostCuda(has_graphs=True))
    for batch in (8, 1, 1, 2, 32, 1):
        x = np.full((batch, 4), batch, np.float32)
        np.testing.assert_array_equal(engine.infer({"x": x})["y"], 2 * x)
    with pytest.raises(GpusqError, match="takes no x:33x4: x:1x4; x:2x4:8x4:32x4"):
        engine.infer({"x": np.zeros((33, 4), np.float32)})
