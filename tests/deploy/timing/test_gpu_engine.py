"""An engine on a GPU is timed here on a stand-in for TensorRT and CUDA in host memory: what is done, not how fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploy import bench_models, environment, tensorrt_engine
from deploy.bench_models import BenchSpec, device_of, measure
from deploy.progress import Progress
from deploy.timing import gpu_engine, layer_times, taken
from deploy.timing.engine import Model, model_at, read_model
from deploy.timing.gpu_engine import open_gpu_engine
from deploy.timing.interleave import Budget
from deploy.timing.statistics import Resampling
from profiles.errors import GpusqError
from tests.deploy.host_cuda import HostCuda, doubling_api

DOUBLE = '<ir_version: 10, opset_import: ["": 20]> g (float[N,4] x) => (float[N,4] y) { y = Add(x, x) }'
QUICK = BenchSpec(budget=Budget(0.02, 20, 20), resampling=Resampling(resamples=50), streams=2)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[HostCuda]:
    """The stand-ins for CUDA, one for each engine that was loaded."""
    opened: list[HostCuda] = []

    def load(model: Model) -> tensorrt_engine.TensorRtEngine:
        opened.append(HostCuda(has_graphs=True))
        return tensorrt_engine.TensorRtEngine(b"good", "tensorrt", opened[-1])

    monkeypatch.setattr(tensorrt_engine, "import_api", lambda runtime: doubling_api())
    monkeypatch.setattr(gpu_engine, "_load", load)
    for module in (bench_models, taken):
        monkeypatch.setattr(module, "gpus", lambda: (environment.Gpu("NVIDIA A100", "8.0", "580"),))
    return opened


def on_gpu(folder: Path, name: str) -> Model:
    ir.save(ir.from_onnx_text(DOUBLE), folder / "model.onnx")
    return Model(name, folder / "model.onnx", "int8", "0" * 64, runtime="tensorrt 10.16", bundle=folder)


def test_a_call_answers_and_captures_a_graph(tmp_path: Path, held: list[HostCuda]) -> None:
    engine = open_gpu_engine(on_gpu(tmp_path, "a"), 3)
    assert engine.cuda_graph == "not captured yet"
    for _ in range(3):
        compute, latency, enqueue = engine.call()
        assert 0 < enqueue < latency
    assert compute == 0  # the stand-in's events know no time
    assert engine.cuda_graph == "captured"
    x = engine.feed["x"]
    np.testing.assert_array_equal(engine.engine.infer({"x": x})["y"], 2 * x)
    engine.close()
    assert held[0].held == {}


def test_bench_on_a_gpu_tells_enqueue_time_graphs_and_device(tmp_path: Path, held: list[HostCuda]) -> None:
    found, raw = measure([on_gpu(tmp_path, "a"), on_gpu(tmp_path, "b")], True, 2, QUICK, Progress())
    assert (found.device, found.runtime) == ("NVIDIA A100", "tensorrt 10.16")
    assert found.gpu is not None
    candidate = found.engines[1]
    assert candidate.cuda_graph == "captured"
    assert candidate.enqueue is not None
    assert candidate.enqueue.p50_ms.value < candidate.latency.p50_ms.value
    assert candidate.speedup is not None
    assert set(raw[0]) == {"compute_ms", "latency_ms", "enqueue_ms", "throughput_qps"}
    assert len(held) == 2 + 1 + 2  # the two, the pilot's twin, a second stream of each
    assert all(cuda.held == {} for cuda in held)


def test_layers_are_told_by_the_profiler_of_tensorrt(
    tmp_path: Path, held: list[HostCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = doubling_api()
    api.IProfiler = type("IProfiler", (), {})
    monkeypatch.setattr(tensorrt_engine, "import_api", lambda runtime: api)
    engine = open_gpu_engine(on_gpu(tmp_path, "a"), 2)
    context = engine.engine._context
    run = context.execute_async_v3

    def profiled(stream: int) -> bool:
        for name, ms in (("fc1", 1.0), ("fc2", 3.0)):
            context.profiler.report_layer_time(name, ms)
        return bool(run(stream))

    context.execute_async_v3 = profiled
    monkeypatch.setattr(layer_times, "_modules_of_plan", lambda engine: {"fc2": ("blocks.0.fc2",)})
    slow, fast = layer_times.layer_times(engine, 5)
    assert (slow.name, slow.modules, slow.ms, slow.share) == ("fc2", ("blocks.0.fc2",), 3.0, 0.75)
    assert (fast.name, fast.modules) == ("fc1", ())
    assert context.profiler is None
    assert len(held) == 1


def test_cpu_and_gpu_are_not_timed_in_one_run(tmp_path: Path) -> None:
    model = on_gpu(tmp_path, "a")
    assert device_of([model_at(model.path, "c", "fp32")]) == "cpu"
    with pytest.raises(GpusqError, match="some on the CPU"):
        device_of([model, model_at(model.path, "c", "fp32")])


@pytest.mark.skipif(bool(environment.gpus()), reason="this host has a GPU")
def test_a_bundle_for_another_device_is_refused(bundles: dict[str, Path]) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(GpusqError, match="not for this host: it has no NVIDIA GPU") as caught:
        read_model(bundles["a100"])
    assert "as it runs on the CPU" in caught.value.hint
    assert read_model(bundles["cpu"]).precision == "int8"
