"""Run an ONNX graph on onnxruntime's CPU provider to look inside: chosen values become the outputs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from calibration.feed import fit
from calibration.padding import MASK
from calibration.rows import Rows
from profiles.errors import GpusqError

Array = npt.NDArray[Any]
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_ERRORS_ONLY = 3
# Exact 8-bit products on processors without VNNI; and onnxruntime cannot load what this optimizer makes of some
# quantizers (microsoft/onnxruntime#25526).
_EXACT_INT8 = ("session.x64quantprecision", "1")
# Threads that spin on after a call take the cores from whatever runs next, such as another session.
_STOP_SPINNING = ("session.force_spinning_stop", "1")
# Quantizers are computed as they stand: fusing them fails where a tensor in between is to be measured.
_QDQ_AS_THEY_ARE = ("session.disable_quant_qdq", "1")
_MOVES_QDQ = "QDQPropagationTransformer"


def float_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """What may hold floats in the main graph, in its order: inputs, constants, outputs of nodes."""
    for value in (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)):
        if value.dtype in (None, *FLOATS):
            yield value


def choose(graph: ir.Graph, tensors: Sequence[str]) -> list[ir.Value]:
    """The float values called `tensors`, in the graph's order.

    Raises:
        ValueError: the graph has no float tensor of a given name.
    """
    values = {value.name: value for value in float_values(graph)}
    for name in tensors:
        if name not in values:
            raise ValueError(f"the graph has no float tensor {name!r}")
    wanted = set(tensors)
    return [value for name, value in values.items() if name in wanted]


def as_float32(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Append a Cast of `value` to float32; one of float32 to itself costs nothing."""
    node = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=name)
    node.outputs[0].name, node.outputs[0].type = f"{name}:0", ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    return node.outputs[0]


def answer_only(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Make `outputs` the outputs of the graph; what only the former ones needed goes, and so do inputs but the mask."""
    graph = model.graph
    graph.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if not value.uses() and not value.is_initializer()]:
        if value.name != MASK:
            graph.inputs.remove(value)


def over_batches(
    model: ir.Model, attach: Callable[[ir.Graph], Sequence[ir.Value]], samples: Mapping[str, Rows], batch: int
) -> Iterator[tuple[dict[str, Array], list[Array]]]:
    """Run a copy of `model` with no outputs but those that `attach` adds; yield inputs and outputs of each batch."""
    copy = model.clone()
    outputs = attach(copy.graph)
    if not outputs:
        return
    answer_only(copy, outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probed.onnx"
        ir.save(copy, path, external_data="probed.data")  # streams the weights: they are in memory only once
        session = open_session(path)
        for feed in feeds(session.get_inputs(), samples, batch):
            yield feed, session.run(None, feed)


def session_options() -> Any:
    """The onnxruntime.SessionOptions that all sessions have: all cores of the process, exact 8 bits, no spinning on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry(*_EXACT_INT8)
    options.add_session_config_entry(*_STOP_SPINNING)
    return options


def open_session(path: Path) -> Any:
    """An onnxruntime session of the file at `path` on all cores of this process."""
    import onnxruntime

    options = session_options()
    options.add_session_config_entry(*_QDQ_AS_THEY_ARE)
    # Each reduction right after its tensor: the default order takes them all at the end, and all tensors wait for it.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=[_MOVES_QDQ]
    )


def feeds(inputs: Sequence[Any], samples: Mapping[str, Rows], batch: int, first: int = 0) -> Iterator[dict[str, Array]]:
    """The samples in batches, from batch `first` on; a fixed batch is filled up with its last sample."""
    for wanted in inputs:
        if wanted.name not in samples:
            raise GpusqError(
                f"there are no samples for the input {wanted.name!r}", hint="give every input of the model"
            )
    fixed = fixed_batch(inputs)
    step, count = fixed or batch, min((len(samples[wanted.name]) for wanted in inputs), default=1)
    for start in range(first * step, count, step):
        rows = np.arange(start, start + step if fixed else min(start + step, count)).clip(max=count - 1)
        yield fit(inputs, {wanted.name: samples[wanted.name][rows] for wanted in inputs})


def rows_of(feed: Mapping[str, Array]) -> int:
    """How many samples a batch holds."""
    return max((len(array) for array in feed.values()), default=1)


def fixed_batch(inputs: Sequence[Any]) -> int | None:
    """The number of samples that the session's inputs take at once, where that is fixed."""
    return next((wanted.shape[0] for wanted in inputs if wanted.shape and isinstance(wanted.shape[0], int)), None)
