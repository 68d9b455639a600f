"""cuda-bindings and PyCUDA need a GPU. Modules that only note what they are asked stand in for them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from enum import IntEnum
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.cuda import Cuda
from deploy.cuda_bindings_api import CudaBindings
from deploy.pycuda_api import PyCuda
from profiles.errors import GpusqError

Calls = list[tuple[Any, ...]]


class Error(IntEnum):
    success = 0
    no_memory = 2


class Runtime:
    """cuda.bindings.runtime: every function answers (error, a number that counts up)."""

    cudaStreamNonBlocking = 1  # noqa: N815  CUDA's name
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")  # noqa: N815

    def __init__(self) -> None:
        self.calls: Calls = []
        self.error = Error.success

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.error, len(self.calls)

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    real = importlib.import_module
    monkeypatch.setattr(metadata, "version", lambda package: "1.0")
    monkeypatch.setattr(
        importlib, "import_module", lambda name: found if name == "cuda.bindings.runtime" else real(name)
    )
    return found


def test_copies_name_their_direction_and_everything_its_stream(runtime: Runtime) -> None:
    cuda: Cuda = CudaBindings()
    array, stream = np.zeros(3, np.float32), cuda.create_stream()
    address = cuda.allocate(0)
    cuda.upload(address, array, stream)
    cuda.download(array, address, stream)
    cuda.synchronize(stream)
    cuda.free(address)
    cuda.destroy_stream(stream)
    assert runtime.calls == [
        ("cudaFree", 0),
        ("cudaStreamCreateWithFlags", 1),
        ("cudaMalloc", 1),
        ("cudaMemcpyAsync", address, array.ctypes.data, 12, "up", stream),
        ("cudaMemcpyAsync", array.ctypes.data, address, 12, "down", stream),
        ("cudaStreamSynchronize", stream),
        ("cudaFree", address),
        ("cudaStreamDestroy", stream),
    ]
    assert cuda.name == "cuda-bindings 1.0"


def test_a_graph_is_captured_launched_and_given_back(runtime: Runtime) -> None:
    cuda = CudaBindings()
    launch = cuda.capture(7, lambda: runtime.calls.append(("enqueued",)))
    launch()
    launch()
    del launch
    assert [call[0] for call in runtime.calls[1:]] == [
        "cudaStreamBeginCapture",
        "enqueued",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
        "cudaGraphLaunch",
        "cudaGraphExecDestroy",
    ]


def test_events_are_waited_for(runtime: Runtime) -> None:
    cuda = CudaBindings()
    start, stop = cuda.record(7), cuda.record(7)
    assert cuda.elapsed_ms(start, stop) > 0
    assert runtime.calls[-2:] == [("cudaEventSynchronize", stop), ("cudaEventElapsedTime", start, stop)]


def test_a_code_that_is_no_success_is_one_error_by_its_name(runtime: Runtime) -> None:
    cuda = CudaBindings()
    runtime.error = Error.no_memory
    with pytest.raises(GpusqError, match="CUDA: no_memory"):
        cuda.allocate(1)


class Noted:
    """An object of PyCUDA that notes its calls; as a number it is 64."""

    handle = 9

    def __init__(self, calls: Calls, name: str) -> None:
        self.calls, self.kind = calls, name

    def __int__(self) -> int:
        return 64

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((f"{self.kind}.{name}", *[a for a in arguments if isinstance(a, int)]))
            return 1.5 if name == "time_till" else Noted(self.calls, name)

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []
    package, module = ModuleType("pycuda"), ModuleType("pycuda.driver")
    for name in ("init", "Device", "mem_alloc", "Stream", "Event", "memcpy_htod_async", "memcpy_dtoh_async"):

        def call(*arguments: Any, name: str = name) -> Noted:
            calls.append((name, *[a for a in arguments if isinstance(a, int)]))
            return Noted(calls, name)

        setattr(module, name, call)
    package.driver = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    monkeypatch.setattr(metadata, "version", lambda package: "1.0")
    return calls


def test_pycuda_takes_the_primary_context_and_has_no_graphs(driver: Calls) -> None:
    cuda: Cuda = PyCuda()
    assert driver == [("init",), ("Device", 0), ("Device.retain_primary_context",), ("retain_primary_context.push",)]
    assert not cuda.has_graphs
    with pytest.raises(GpusqError, match="no CUDA graphs"):
        cuda.capture(9, lambda: None)


def test_pycuda_copies_and_measures(driver: Calls) -> None:
    cuda = PyCuda()
    driver.clear()
    array, stream, address = np.zeros(3, np.float32), cuda.create_stream(), cuda.allocate(12)
    cuda.upload(address, array, stream)
    cuda.download(array, address, stream)
    assert cuda.elapsed_ms(cuda.record(stream), cuda.record(stream)) == 1.5
    cuda.synchronize(stream)
    cuda.free(address)
    cuda.destroy_stream(stream)
    names = [call[0] for call in driver]
    assert names[:4] == ["Stream", "mem_alloc", "memcpy_htod_async", "memcpy_dtoh_async"]
    assert names[-2:] == ["Stream.synchronize", "mem_alloc.free"]
    assert ("Event.time_till",) in driver


def test_pycuda_without_a_driver_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(GpusqError, match="PyCUDA: "):
        PyCuda()
