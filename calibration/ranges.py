"""The largest absolute value of tensors inside an ONNX graph, over samples.

    x ─► ReduceMax ────────────┐
    x ─► ReduceMin ─► Neg ─────┴► Max ─┐
    x ─► ReduceL1 ─► · 0 ──────────────┴► Add ─► amax(x), one float32        max(max x, −min x) + 0 · Σ|x|

The graph gets one such scalar for each tensor and nothing else as outputs; no tensor is copied. The sum is there for
NaN and infinity, with which 0 · Σ|x| is NaN: onnxruntime's ReduceMax loses a NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.inference import Array, as_float32, choose, float_values, over_batches
from calibration.rows import Rows
from profiles.errors import GpusqError

_MODULE_KEY = "gpusq.module"  # as exporters.module_names has it, which cannot be imported from here
_PREFIX = "gpusq.amax"


def measure_amax(
    model: Path | ir.Model,
    tensors: Sequence[str],
    samples: Mapping[str, Rows],
    batch: int,
    *,
    check_finite: bool = True,
) -> dict[str, float]:
    """Return the largest absolute value of each of `tensors` over all samples, computed in float32 on the CPU.

    Args:
        model: a graph, which is not changed, or the path of an ONNX file.
        tensors: names of float tensors of the main graph: inputs, constants or outputs of nodes.
        samples: arrays [N, …] by input name, as the model takes them; memory-mapped ones are read batch by batch.
        batch: samples a run; a model with a fixed batch size is run at that one.
        check_finite: whether a tensor that is not finite is an error; else its value is infinite or NaN.

    Raises:
        GpusqError: an input has no samples, or a tensor became NaN or infinite.
        ValueError: the graph has no float tensor of a given name.
    """
    source = ir.load(model) if isinstance(model, Path) else model
    if not tensors:
        return {}
    largest: dict[str, float] = dict.fromkeys(tensors, 0.0)
    for feed, found in _amaxes(source, tensors, samples, batch):
        if check_finite and not all(np.isfinite(value) for value in found.values()):
            raise not_finite(source, feed, next(name for name, value in found.items() if not np.isfinite(value)))
        largest = {name: float(np.maximum(value, found[name])) for name, value in largest.items()}
    return largest


def not_finite(model: ir.Model, feed: Mapping[str, Array], tensor: str) -> GpusqError:
    """The error that names where a graph first makes NaN or infinity of what is finite.

    A mask of −∞ among the constants is no such place, nor is what reads it.

    Args:
        model: the graph.
        feed: a batch on which it does.
        tensor: where that was seen; it is named where all tensors are finite but what was computed of it.
    """
    names = list(dict.fromkeys(str(value.name) for value in float_values(model.graph)))
    ((_, amax),) = _amaxes(model, names, feed, max(len(array) for array in feed.values()))
    broken = [name for name in names if not np.isfinite(amax[name])]
    made = [
        (str(value.name), node)
        for node in model.graph
        for value in node.outputs
        if value.name in broken and not any(read is not None and read.name in broken for read in node.inputs)
    ]
    name, where = (made[0][0], f" in {_told(made[0][1])}") if made else ((broken or [tensor])[0], "")
    return GpusqError(
        f"the tensor {name!r} became NaN or infinite{where}",
        hint="check the samples' preprocessing and the model in float32",
    )


def _told(node: ir.Node) -> str:
    """What the node does, its name, and the module that it is of where that is known."""
    module = node.metadata_props.get(_MODULE_KEY)
    return f"{node.op_type} {node.name!r}" + (f" of {module!r}" if module else "")


def _amaxes(
    model: ir.Model, tensors: Sequence[str], samples: Mapping[str, Rows], batch: int
) -> Iterator[tuple[dict[str, Array], dict[str, float]]]:
    """Each batch and what the scalars are on it."""
    names = [str(value.name) for value in choose(model.graph, tensors)]

    def attach(graph: ir.Graph) -> list[ir.Value]:
        name = f"{_PREFIX}/zero"
        zero = ir.Value(name=name, const_value=ir.tensor(np.zeros((), np.float32), name=name))
        graph.register_initializer(zero)
        return [_probe(graph, value, zero, index) for index, value in enumerate(choose(graph, tensors))]

    for feed, found in over_batches(model, attach, samples, batch):
        yield feed, {name: float(amax) for name, amax in zip(names, found, strict=True)}


def _probe(graph: ir.Graph, value: ir.Value, zero: ir.Value, index: int) -> ir.Value:
    """Append the nodes that reduce `value` to its scalar."""

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{_PREFIX}/{index}/{op_type}")
        node.outputs[0].name = f"{node.name}:0"
        graph.append(node)
        return node.outputs[0]

    x = as_float32(graph, value, f"{_PREFIX}/{index}/Cast")
    largest = add("Max", add("ReduceMax", x, keepdims=0), add("Neg", add("ReduceMin", x, keepdims=0)))
    output = add("Add", largest, add("Mul", add("ReduceL1", x, keepdims=0), zero))
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    return output
