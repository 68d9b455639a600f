"""An engine of TensorRT or TensorRT-RTX that is timed on the GPU of this host.

    start ── copy inputs ── begin ── launch ── end ── copy outputs ── wait ── done
    compute = end − begin, two CUDA events     latency = done − start     enqueue = the launch, on the host's clock

As in trtexec, the launch is a CUDA graph where one was captured. No GPU has run this yet: docs/unproven.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.feed import fit
from deploy.engine import open_engine
from deploy.manifest import MODEL_FILE
from deploy.tensorrt_engine import Request, TensorRtEngine
from deploy.timing.engine import Feed, Model, Times, random_feed

_TYPES = {
    ir.DataType.FLOAT: "tensor(float)",
    ir.DataType.FLOAT16: "tensor(float16)",
    ir.DataType.DOUBLE: "tensor(double)",
    ir.DataType.INT64: "tensor(int64)",
    ir.DataType.INT32: "tensor(int32)",
    ir.DataType.UINT8: "tensor(uint8)",
    ir.DataType.INT8: "tensor(int8)",
    ir.DataType.BOOL: "tensor(bool)",
}


@dataclass(frozen=True)
class _Input:
    """An input as onnxruntime describes it."""

    name: str
    shape: list[int | str | None]
    type: str


@dataclass
class GpuEngine:
    """A loaded engine with its inputs. Not for two threads at once: each opens its own."""

    model: Model
    engine: TensorRtEngine
    feed: Feed
    request: Request = field(init=False)

    def __post_init__(self) -> None:
        self.request = self.engine.bind(self.feed)

    @property
    def cuda_graph(self) -> str:
        """Whether the launches are a CUDA graph; if not, why."""
        return self.engine.cuda_graph

    def call(self) -> Times:
        """Answer one request."""
        return self.engine.time(self.request)

    def beside(self) -> GpuEngine:
        """The same engine for another thread, loaded once more: with its own weights, context and stream."""
        return GpuEngine(self.model, _load(self.model), self.feed)

    def close(self) -> None:
        """Give the device's memory back."""
        self.engine.close()


def open_gpu_engine(model: Model, batch: int, seed: int = 0) -> GpuEngine:
    """Load the engine of a bundle with its inputs, or with random ones of `batch` samples.

    Raises:
        GpusqError: the engine is not for this host, its batch is fixed and another one, or an input varies otherwise.
    """
    inputs = _inputs(model)
    feed = model.feed
    if feed is None:
        feed = random_feed(inputs, batch, np.random.default_rng(seed), model.name)
    return GpuEngine(model, _load(model), fit(inputs, feed))


def _load(model: Model) -> TensorRtEngine:
    assert model.bundle is not None
    engine = open_engine(model.bundle)
    assert isinstance(engine, TensorRtEngine)
    return engine


def _inputs(model: Model) -> list[Any]:
    """What the graph of the bundle takes."""
    assert model.bundle is not None
    graph = ir.load(model.bundle / MODEL_FILE).graph
    return [_Input(value.name or "", _dims(value), _type(value)) for value in graph.inputs]


def _dims(value: ir.Value) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def _type(value: ir.Value) -> str:
    return _TYPES.get(value.dtype, str(value.dtype)) if value.dtype is not None else "tensor(unknown)"
