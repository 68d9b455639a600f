"""CUDA and TensorRT played by the memory of the host: what is done with them, on a machine without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from deploy.cuda import Array, Launch


class HostCuda:
    """CUDA's part played by the host's own memory: what the engine does with addresses and graphs, without a GPU."""

    name = "the host"

    def __init__(self, *, has_graphs: bool) -> None:
        self.has_graphs = has_graphs
        self.held: dict[int, Any] = {}
        self.captured = 0

    def allocate(self, size: int) -> int:
        memory = ctypes.create_string_buffer(max(size, 1))
        self.held[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        del self.held[address]

    def create_stream(self) -> int:
        return 7

    def destroy_stream(self, stream: int) -> None:
        assert stream == 7

    def synchronize(self, stream: int) -> None:
        assert stream == 7

    def upload(self, address: int, array: Array, stream: int) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: Array, address: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def record(self, stream: int) -> Any:
        return None

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        return 0.0

    def capture(self, stream: int, enqueue: Launch) -> Launch:
        self.captured += 1
        return enqueue


def doubling_api(*profiles: tuple[tuple[int, ...], ...]) -> SimpleNamespace:
    """A module like tensorrt whose only engine doubles float32 [N, 4]; of its `profiles` it runs only the chosen."""
    shape: dict[str, tuple[int, ...]] = {}
    chosen = [0]

    def switch(index: int, stream: int) -> bool:
        chosen[0] = index
        return stream == 7

    address: dict[str, int] = {}

    def set_input_shape(name: str, given: tuple[int, ...]) -> bool:
        shape[name] = given
        smallest, _, largest = profiles[chosen[0]] if profiles else ((1, 4), (1, 4), (99, 4))
        return len(given) == 2 and smallest <= given <= largest

    def execute(stream: int) -> bool:
        count = int(np.prod(shape["x"]))
        x, y = (np.ctypeslib.as_array((ctypes.c_float * count).from_address(address[name])) for name in ("x", "y"))
        y[:] = 2 * x
        return True

    context = SimpleNamespace(
        set_input_shape=set_input_shape,
        get_tensor_shape=lambda name: shape["x"],
        set_tensor_address=address.__setitem__,
        execute_async_v3=execute,
        set_optimization_profile_async=switch,
    )
    engine = SimpleNamespace(
        num_optimization_profiles=len(profiles) or 1,
        get_tensor_profile_shape=lambda name, index: list(profiles[index]),
        num_io_tensors=2,
        get_tensor_name=["x", "y"].__getitem__,
        get_tensor_mode={"x": "in", "y": "out"}.get,
        get_tensor_dtype=lambda name: "float",
        create_execution_context=lambda: context,
    )
    logger: Callable[..., None] = lambda severity: None  # noqa: E731
    logger.WARNING = 1  # type: ignore[attr-defined]
    return SimpleNamespace(
        __version__="0",
        Logger=logger,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"good" else None),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        nptype=lambda dtype: np.float32,
    )
