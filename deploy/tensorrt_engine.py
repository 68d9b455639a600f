"""Run an engine of TensorRT or TensorRT-RTX: numpy arrays in, numpy arrays out.

    choose the optimization profile ─► copy inputs ─► [set shapes, enqueue] ─► copy outputs ─► wait

For shapes that come a second time in a row, what is in brackets is a CUDA graph, where the package for CUDA has graphs
and the capture succeeds. Buffers are kept between calls, one for each tensor, and grow; a graph ends with its shapes
and its buffers. An engine is code: `engine_host_code_allowed` stays off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploy.build_options import InputRange
from deploy.cuda import Array, Cuda, Launch, open_cuda
from deploy.optimization_profiles import Profile, choose
from deploy.tensorrt_api import import_api
from profiles.errors import GpusqError

_log = logging.getLogger(__name__)
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_NS_PER_MS = 1e6


@dataclass(frozen=True)
class Request:
    """One request: arrays that live on the host, with buffers for them on the device."""

    inputs: Mapping[str, Array]
    outputs: dict[str, Array]

    @property
    def shapes(self) -> Shapes:
        """The shapes of the inputs."""
        return tuple((name, array.shape) for name, array in self.inputs.items())


def _profiler(api: Any) -> Any:
    """An IProfiler that keeps what it is told in `times`."""

    class Kept(api.IProfiler):  # type: ignore[misc]  # the runtime is imported when an engine is loaded
        def __init__(self) -> None:
            api.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Kept()


class TensorRtEngine:
    """One engine with one context on one stream; not for two threads at once."""

    def __init__(self, engine: bytes, runtime: str, cuda: Cuda | None = None) -> None:
        """Load `engine`; raises GpusqError where this runtime does not take it, or there is no GPU."""
        self._cuda = cuda or open_cuda()
        self._api: Any = import_api(runtime)
        self._logger = self._api.Logger(self._api.Logger.WARNING)
        self._runtime = self._api.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise GpusqError(
                f"{runtime} {self._api.__version__} does not load the engine",
                hint="it is of another version or device: build it again here",
            )
        self._context = self._engine.create_execution_context()
        self._stream = self._cuda.create_stream()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._shapes: Shapes | None = None
        self._launch: Launch | None = None
        self.cuda_graph = "not captured yet" if self._cuda.has_graphs else f"not used: {self._cuda.name} has none"
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = self._api.TensorIOMode.INPUT
        self.inputs = tuple(name for name in names if self._engine.get_tensor_mode(name) == is_input)
        self.outputs = tuple(name for name in names if name not in self.inputs)
        count = self._engine.num_optimization_profiles
        self._profiles = [self._profile(index) for index in range(count)] if count > 1 else []
        self._chosen = 0  # where TensorRT starts

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one request; each array is cast to the engine's type."""
        request = self.bind(inputs)
        self._upload(request)
        self._run(request.shapes)
        self._download(request)
        return request.outputs

    def time(self, request: Request) -> tuple[int, int, int]:
        """Answer a request that was bound last, and return three times in nanoseconds.

        Returns:
            compute: between two CUDA events around the launch, by the device's clock.
            latency: from the first copy to the device to the last one back, by the host's clock.
            enqueue: what the launch alone took on the host.
        """
        clock = time.perf_counter_ns
        start = clock()
        self._upload(request)
        begin, before = self._cuda.record(self._stream), clock()
        self._run(request.shapes)
        enqueue = clock() - before
        end = self._cuda.record(self._stream)
        self._download(request)
        latency = clock() - start
        return round(self._cuda.elapsed_ms(begin, end) * _NS_PER_MS), latency, enqueue

    def layer_times(self, request: Request, calls: int) -> dict[str, list[float]]:
        """Milliseconds of each layer in `calls` calls of the request that was bound last, without a CUDA graph."""
        kept = _profiler(self._api)
        self._context.profiler = kept
        self._upload(request)
        for _ in range(calls):
            self._enqueue()
            self._cuda.synchronize(self._stream)
        self._context.profiler = None
        times: dict[str, list[float]] = kept.times
        return times

    def bind(self, inputs: Mapping[str, Array]) -> Request:
        """Give every tensor of a request its place on the device.

        Raises:
            GpusqError: the engine takes no such shape.
        """
        given = {name: np.ascontiguousarray(inputs[name], self._dtype(name)) for name in self.inputs}
        self._choose({name: array.shape for name, array in given.items()})
        for name, array in given.items():
            if not self._context.set_input_shape(name, array.shape):
                raise GpusqError(f"the engine takes no {list(array.shape)} for {name!r}", hint="build it with --shapes")
            self._place(name, array.nbytes)
        results = {
            name: np.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name)) for name in self.outputs
        }
        for name, array in results.items():
            self._place(name, array.nbytes)
        return Request(given, results)

    def _upload(self, request: Request) -> None:
        for name, array in request.inputs.items():
            self._cuda.upload(self._buffers[name][0], array, self._stream)

    def _download(self, request: Request) -> None:
        for name, array in request.outputs.items():
            self._cuda.download(array, self._buffers[name][0], self._stream)
        self._cuda.synchronize(self._stream)

    def close(self) -> None:
        """Give the device's memory back."""
        self._launch = None
        for address, _ in self._buffers.values():
            self._cuda.free(address)
        self._buffers.clear()
        self._cuda.destroy_stream(self._stream)

    def _profile(self, index: int) -> Profile:
        """The ranges of an optimization profile."""
        shapes = {name: self._engine.get_tensor_profile_shape(name, index) for name in self.inputs}
        return [InputRange(name, *map(tuple, three)) for name, three in shapes.items()]

    def _choose(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Switch to the optimization profile for `shapes`, where the engine has several."""
        if not self._profiles:
            return
        index = choose(self._profiles, shapes)
        if index is None:
            taken = "; ".join(", ".join(map(str, profile)) for profile in self._profiles)
            raise GpusqError(f"the engine takes no {_said(shapes)}: {taken}", hint="build it with more --shapes")
        if index != self._chosen and not self._context.set_optimization_profile_async(index, self._stream):
            raise GpusqError(
                f"the engine did not switch to its profile {index}", hint="`gpusq -v` shows TensorRT's log"
            )
        self._chosen = index

    def _dtype(self, name: str) -> Any:
        return np.dtype(self._api.nptype(self._engine.get_tensor_dtype(name)))

    def _place(self, name: str, size: int) -> None:
        """Give a tensor a buffer that is large enough; a graph holds addresses, so it ends when one moves."""
        address, capacity = self._buffers.get(name, (0, -1))
        if capacity < size:
            if capacity >= 0:
                self._cuda.free(address)
            self._shapes = None
            self._buffers[name] = address, _ = self._cuda.allocate(size), size
        self._context.set_tensor_address(name, address)

    def _run(self, shapes: Shapes) -> None:
        """The first time as it is, which does the work that new shapes put off; from the second on as a graph."""
        if shapes != self._shapes:
            self._shapes, self._launch = shapes, None
            self._enqueue()
            return
        if self._launch is None:
            self._launch = self._captured() if self._cuda.has_graphs else self._enqueue
        self._launch()

    def _captured(self) -> Launch:
        try:
            launch = self._cuda.capture(self._stream, self._enqueue)
            self.cuda_graph = "captured"
            return launch
        except GpusqError as error:
            self.cuda_graph = f"not captured: {error.message}"
            _log.warning("no CUDA graph of this engine: %s", error.message)
            return self._enqueue

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise GpusqError("the engine did not run", hint="`gpusq -v` shows TensorRT's log")


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
