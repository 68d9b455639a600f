"""CUDA through PyCUDA, for hosts that have it. It has no graphs, and it needs the device's primary context.

Names as in src/wrapper/wrap_cudadrv.cpp and pycuda/driver.py of PyCUDA 2026.1.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from deploy.cuda import Array, Launch
from profiles.errors import GpusqError


class PyCuda:
    """`deploy.cuda.Cuda` over PyCUDA's driver API."""

    has_graphs = False

    def __init__(self) -> None:
        """Raises GpusqError where CUDA finds no device."""
        try:
            import pycuda.driver as driver

            driver.init()
            self._context = driver.Device(0).retain_primary_context()
            self._context.push()
        except Exception as error:  # pycuda's own, or the loader's that finds no driver
            raise GpusqError(f"PyCUDA: {error}", hint="is the driver loaded? `gpusq doctor` says") from error
        self._driver: Any = driver
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self.name = f"pycuda {metadata.version('pycuda')}"

    def allocate(self, size: int) -> int:
        """As of Cuda."""
        memory = self._driver.mem_alloc(max(size, 1))
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """As of Cuda."""
        self._memory.pop(address).free()

    def create_stream(self) -> int:
        """As of Cuda."""
        stream = self._driver.Stream(1)  # CU_STREAM_NON_BLOCKING
        self._streams[int(stream.handle)] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """As of Cuda; PyCUDA's own goes with its last reference."""
        del self._streams[stream]

    def synchronize(self, stream: int) -> None:
        """As of Cuda."""
        self._streams[stream].synchronize()

    def upload(self, address: int, array: Array, stream: int) -> None:
        """As of Cuda."""
        self._driver.memcpy_htod_async(address, array, self._streams[stream])

    def download(self, array: Array, address: int, stream: int) -> None:
        """As of Cuda."""
        self._driver.memcpy_dtoh_async(array, address, self._streams[stream])

    def record(self, stream: int) -> Any:
        """As of Cuda."""
        event = self._driver.Event()
        event.record(self._streams[stream])
        return event

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """As of Cuda."""
        stop.synchronize()
        return float(start.time_till(stop))

    def capture(self, stream: int, enqueue: Launch) -> Launch:
        """Raises GpusqError: PyCUDA has no graphs."""
        raise GpusqError("PyCUDA has no CUDA graphs", hint="pip install cuda-bindings")
