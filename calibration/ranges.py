"""The largest absolute value of tensors inside an ONNX graph, over samples.

    x ─► ReduceMax ────────────┐
    x ─► ReduceMin ─► Neg ─────┴► Max ─┐
    x ─► ReduceL1 ─► · 0 ──────────────┴► Add ─► amax(x), one float32        max(max x, −min x) + 0 · Σ|x|

The graph gets one such scalar for each tensor and nothing else as outputs; no tensor is copied. The sum is there for
NaN and infinity, with which 0 · Σ|x| is NaN: onnxruntime's ReduceMax loses a NaN.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration.rows import Rows
from profiles.errors import GpusqError

Array = npt.NDArray[Any]
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_PREFIX = "gpusq.amax"
_ERRORS_ONLY = 3
# Exact 8-bit products on processors without VNNI; and onnxruntime cannot load what this optimizer makes of some
# quantizers (microsoft/onnxruntime#25526).
_EXACT_INT8 = ("session.x64quantprecision", "1")
_MOVES_QDQ = "QDQPropagationTransformer"


def measure_amax(
    model: Path | ir.Model, tensors: Sequence[str], samples: Mapping[str, Rows], batch: int
) -> dict[str, float]:
    """Return the largest absolute value of each of `tensors` over all samples, computed in float32 on the CPU.

    Args:
        model: a graph, which is not changed, or the path of an ONNX file.
        tensors: names of float tensors of the main graph: inputs, constants or outputs of nodes.
        samples: arrays [N, …] by input name, as the model takes them; memory-mapped ones are read batch by batch.
        batch: samples a run; a model with a fixed batch size is run at that one.

    Raises:
        GpusqError: an input has no samples, or a tensor became NaN or infinite.
        ValueError: the graph has no float tensor of a given name.
    """
    probed, names = _probed(ir.load(model) if isinstance(model, Path) else model.clone(), tensors)
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probed.onnx"
        ir.save(probed, path, external_data="probed.data")  # streams the weights: they are in memory only once
        session = _open_session(path)
        largest = np.zeros(len(names), np.float32)
        for feed in _feeds(session.get_inputs(), samples, batch):
            found = np.array(session.run(None, feed), np.float32)
            _check_finite(names, found)
            largest = np.maximum(largest, found)
    by_name = dict(zip(names, largest.tolist(), strict=True))
    return {name: by_name[name] for name in tensors}


def _probed(model: ir.Model, tensors: Sequence[str]) -> tuple[ir.Model, list[str]]:
    """The model with nothing but the scalars as outputs, and the names of `tensors` in graph order."""
    graph = model.graph
    values = {value.name: value for value in _values(graph)}
    for name in tensors:
        if name not in values or values[name].dtype not in (None, *_FLOATS):
            raise ValueError(f"the graph has no float tensor {name!r}")
    wanted = set(tensors)
    names = [name for name in values if name in wanted]
    zero = ir.Value(name=f"{_PREFIX}/zero", const_value=ir.tensor(np.zeros((), np.float32), name=f"{_PREFIX}/zero"))
    graph.register_initializer(zero)
    graph.outputs[:] = [_probe(graph, values[name], zero, index) for index, name in enumerate(names)]
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses() and not value.is_initializer()]:
        graph.inputs.remove(value)
    return model, [str(name) for name in names]


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _probe(graph: ir.Graph, value: ir.Value, zero: ir.Value, index: int) -> ir.Value:
    """Append the nodes that reduce `value` to its scalar; a Cast of float32 to itself costs nothing."""

    def add(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{_PREFIX}/{index}/{op_type}")
        node.outputs[0].name = f"{node.name}:0"
        graph.append(node)
        return node.outputs[0]

    x = add("Cast", value, to=int(ir.DataType.FLOAT))
    largest = add("Max", add("ReduceMax", x, keepdims=0), add("Neg", add("ReduceMin", x, keepdims=0)))
    output = add("Add", largest, add("Mul", add("ReduceL1", x, keepdims=0), zero))
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    return output


def _open_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry(*_EXACT_INT8)
    # Each scalar right after its tensor: the default order takes them all at the end, and all tensors wait for it.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_MOVES_QDQ]
    )


def _feeds(inputs: Sequence[Any], samples: Mapping[str, Rows], batch: int) -> Iterator[dict[str, Array]]:
    """The samples in batches; a fixed batch is filled up with its last sample, which changes no maximum."""
    for wanted in inputs:
        if wanted.name not in samples:
            raise GpusqError(
                f"there are no samples for the input {wanted.name!r}", hint="give every input of the model"
            )
    fixed = next((wanted.shape[0] for wanted in inputs if wanted.shape and isinstance(wanted.shape[0], int)), None)
    step, count = fixed or batch, min((len(samples[wanted.name]) for wanted in inputs), default=1)
    for start in range(0, count, step):
        rows = np.arange(start, start + step if fixed else min(start + step, count)).clip(max=count - 1)
        yield {wanted.name: samples[wanted.name][rows] for wanted in inputs}


def _check_finite(names: Sequence[str], found: npt.NDArray[np.float32]) -> None:
    for name, value in zip(names, found.tolist(), strict=True):
        if not np.isfinite(value):
            raise GpusqError(
                f"the tensor {name!r} became NaN or infinite on the samples",
                hint="check the samples' preprocessing and the model in float32",
            )
