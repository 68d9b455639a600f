"""Reduce tensors inside an ONNX graph to small arrays, batch by batch: constant memory whatever the number of samples.

    x ─► Abs ─► ReduceMax over all axes but one ───► amax of each channel, float32 [C]
    x ─► Mul(x, x) ─► ReduceMean over the same ────► mean square of each channel, float32 [C]

Nothing but these arrays leaves the graph; no tensor is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.inference import as_float32, choose, over_batches, rows_of
from calibration.padding import mask_of
from calibration.ranges import not_finite
from calibration.rows import Rows
from calibration.search_memory import Memory

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
_PREFIX = "gpusq.probe"


@dataclass(frozen=True)
class Feed:
    """The samples that statistics are taken on.

    Attributes:
        samples: arrays [N, …] by input name, as the model takes them.
        batch: samples a run; a model with a fixed batch size is run at that one.
        labels: the right classes, int64 [N]; None where there are none.
        memory: where searches on them are remembered; None: nowhere.
        tell: is told what a search found.
    """

    samples: Mapping[str, Rows]
    batch: int = 8
    labels: npt.NDArray[np.int64] | None = None
    memory: Memory | None = None
    tell: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Channels:
    """What the channels of one tensor reach, float32 [C]: the largest magnitude, and the mean of the squares."""

    amax: Float
    mean_square: Float


class Probe:
    """Appends reductions to one graph; each has a number of its own in its nodes' names."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._count = 0

    def add(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Append a node, and return its output."""
        self._count += 1
        node = ir.node(op_type, list(inputs), attributes=attributes, name=f"{_PREFIX}/{self._count}/{op_type}")
        node.outputs[0].name = f"{node.name}:0"
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, array: Array) -> ir.Value:
        """Register a constant."""
        self._count += 1
        name = f"{_PREFIX}/{self._count}/constant"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def float32(self, value: ir.Value) -> ir.Value:
        """The value in float32."""
        self._count += 1
        return as_float32(self.graph, value, f"{_PREFIX}/{self._count}/Cast")

    def output(self, value: ir.Value, dims: int) -> ir.Value:
        """The value, declared as an output of `dims` axes."""
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * dims)
        return value

    def kept(self, value: ir.Value, source: ir.Value) -> ir.Value:
        """`value`, made of `source` and of its shape, with zeros where the mask says that there is padding."""
        mask = mask_of(self.graph, source)
        if mask is None:
            return value
        assert source.shape is not None
        ones = len(source.shape) - len(mask.shape or ())
        axes = self.constant(np.arange(-ones, 0, dtype=np.int64))
        return self.add("Mul", [value, self.add("Unsqueeze", [self.float32(mask), axes])])


def measure_channel_amax(
    model: ir.Model, tensors: Mapping[str, int], samples: Mapping[str, Rows], batch: int
) -> dict[str, Float]:
    """Return the largest magnitude of each channel of `tensors` over all samples, float32 [C].

    Args:
        model: a graph, which is not changed.
        tensors: the axis of the channels by name of a float tensor of known rank.
        samples: arrays [N, …] by input name.
        batch: samples a run; a model with a fixed batch size is run at that one.

    Raises:
        GpusqError: an input has no samples, or a tensor became NaN or infinite.
        ValueError: the graph has no float tensor of a given name and of known rank.
    """
    found = measure_channels(model, tensors, Feed(samples, batch))
    return {name: channels.amax for name, channels in found.items()}


def measure_channels(model: ir.Model, tensors: Mapping[str, int], feed: Feed) -> dict[str, Channels]:
    """Return what the channels of `tensors`, the axis of the channels by name, reach over all samples.

    A fixed batch is filled up with its last sample, which then counts more than once in the means.

    Raises:
        GpusqError: an input has no samples, or a tensor became NaN or infinite.
        ValueError: the graph has no float tensor of a given name and of known rank.
    """
    names = [str(value.name) for value in choose(model.graph, list(tensors))]
    largest: dict[str, Float] = {}
    squares: dict[str, Array] = {}
    total = 0
    for inputs, arrays in over_batches(model, lambda graph: _reductions(graph, tensors), feed.samples, feed.batch):
        rows = rows_of(inputs)
        total += rows
        for index, name in enumerate(names):
            amax, square = arrays[2 * index : 2 * index + 2]
            if not np.isfinite(square).all():
                raise not_finite(model, inputs, name)
            largest[name] = np.maximum(largest[name], amax) if name in largest else amax
            squares[name] = squares.get(name, 0) + rows * square.astype(np.float64)
    return {name: Channels(largest[name], (squares[name] / total).astype(np.float32)) for name in tensors}


def _reductions(graph: ir.Graph, tensors: Mapping[str, int]) -> list[ir.Value]:
    probe, outputs = Probe(graph), []
    for value in choose(graph, list(tensors)):
        if value.shape is None:
            raise ValueError(f"the rank of {value.name!r} is not known")
        rank = len(value.shape)
        kept = tensors[str(value.name)] % rank
        axes = probe.constant(np.array([axis for axis in range(rank) if axis != kept], np.int64))
        x = probe.kept(probe.float32(value), value)
        amax = probe.add("ReduceMax", [probe.add("Abs", [x]), axes], keepdims=0)
        square = probe.add("ReduceMean", [probe.add("Mul", [x, x]), axes], keepdims=0)
        outputs += [probe.output(amax, 1), probe.output(square, 1)]
    return outputs
