"""What an engine needs of CUDA: memory, a stream, events, a graph. cuda-bindings has it all, PyCUDA all but graphs.

Addresses and handles are integers, as TensorRT takes them. PyCUDA is for hosts that have it already; with both,
cuda-bindings is taken.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import numpy.typing as npt

from profiles.errors import GpusqError

Array = npt.NDArray[Any]
Launch = Callable[[], None]


class Cuda(Protocol):
    """The calls; each raises GpusqError with CUDA's own word for what went wrong."""

    @property
    def name(self) -> str:
        """The package and its version."""

    @property
    def has_graphs(self) -> bool:
        """Whether `capture` can be called."""

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes on the device."""

    def free(self, address: int) -> None:
        """Give the bytes at `address` back."""

    def create_stream(self) -> int:
        """The handle of a new stream that does not wait for the default stream."""

    def destroy_stream(self, stream: int) -> None:
        """Give the stream back."""

    def synchronize(self, stream: int) -> None:
        """Wait until everything on `stream` is done."""

    def upload(self, address: int, array: Array, stream: int) -> None:
        """Copy a C-contiguous `array` to the device, in the order of `stream`."""

    def download(self, array: Array, address: int, stream: int) -> None:
        """Fill a C-contiguous `array` from the device, in the order of `stream`."""

    def record(self, stream: int) -> Any:
        """A new event that happens when what is on `stream` now is done."""

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Milliseconds between two events; waits for `stop`."""

    def capture(self, stream: int, enqueue: Launch) -> Launch:
        """Record what `enqueue` puts on `stream` as a graph, and return what launches it there."""


def open_cuda() -> Cuda:
    """Return CUDA as the packages at hand have it.

    Raises:
        GpusqError: there is none, or CUDA has no device.
    """
    if _has("cuda.bindings"):
        from deploy.cuda_bindings_api import CudaBindings

        return CudaBindings()
    if _has("pycuda"):
        from deploy.pycuda_api import PyCuda

        return PyCuda()
    raise GpusqError(
        "running an engine on a GPU needs cuda-bindings or PyCUDA", hint="pip install cuda-bindings (or pycuda)"
    )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
