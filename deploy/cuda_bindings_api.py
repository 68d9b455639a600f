"""CUDA through cuda-bindings, the package of cuda-python; it needs no context of its own."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from deploy.cuda import Array, Launch
from profiles.errors import GpusqError


class CudaBindings:
    """`deploy.cuda.Cuda` over the runtime API."""

    has_graphs = True

    def __init__(self) -> None:
        """Raises GpusqError where CUDA finds no device."""
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
        self._runtime = runtime
        self.name = f"cuda-bindings {metadata.version('cuda-bindings')}"
        self._call(runtime.cudaFree(0))  # makes the device's context

    def allocate(self, size: int) -> int:
        """As of Cuda."""
        return int(self._call(self._runtime.cudaMalloc(max(size, 1))))

    def free(self, address: int) -> None:
        """As of Cuda."""
        self._call(self._runtime.cudaFree(address))

    def create_stream(self) -> int:
        """As of Cuda."""
        return int(self._call(self._runtime.cudaStreamCreateWithFlags(self._runtime.cudaStreamNonBlocking)))

    def destroy_stream(self, stream: int) -> None:
        """As of Cuda."""
        self._call(self._runtime.cudaStreamDestroy(stream))

    def synchronize(self, stream: int) -> None:
        """As of Cuda."""
        self._call(self._runtime.cudaStreamSynchronize(stream))

    def upload(self, address: int, array: Array, stream: int) -> None:
        """As of Cuda."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream))

    def download(self, array: Array, address: int, stream: int) -> None:
        """As of Cuda."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._runtime.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, stream))

    def record(self, stream: int) -> Any:
        """As of Cuda."""
        event = self._call(self._runtime.cudaEventCreate())
        self._call(self._runtime.cudaEventRecord(event, stream))
        return event

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """As of Cuda."""
        self._call(self._runtime.cudaEventSynchronize(stop))
        return float(self._call(self._runtime.cudaEventElapsedTime(start, stop)))

    def capture(self, stream: int, enqueue: Launch) -> Launch:
        """As of Cuda; the capture is of this thread's calls alone."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._runtime.cudaStreamBeginCapture(stream, mode))
        try:
            enqueue()
        finally:
            graph = self._call(self._runtime.cudaStreamEndCapture(stream))
        instance = self._call(self._runtime.cudaGraphInstantiate(graph, 0))
        self._call(self._runtime.cudaGraphDestroy(graph))
        return _Graph(self._runtime, instance, stream)

    def _call(self, answer: tuple[Any, ...]) -> Any:
        return checked(answer)


class _Graph:
    """A graph that can be launched; it goes with its last reference."""

    def __init__(self, runtime: Any, instance: Any, stream: int) -> None:
        self._runtime, self._instance, self._stream = runtime, instance, stream

    def __call__(self) -> None:
        checked(self._runtime.cudaGraphLaunch(self._instance, self._stream))

    def __del__(self) -> None:
        self._runtime.cudaGraphExecDestroy(self._instance)


def checked(answer: tuple[Any, ...]) -> Any:
    """The value behind the error code of an answer; None where there is none.

    Raises:
        GpusqError: the code, by its name, is not success.
    """
    error, *values = answer
    if int(error):
        raise GpusqError(f"CUDA: {error.name}", hint="is the driver loaded? `gpusq doctor` says what this host has")
    return values[0] if values else None
