"""Collect the histograms of tensors inside an ONNX graph over samples, in memory that is bounded.

    samples ─► batches ─► onnxruntime ─► the tensors of one batch ─► a histogram of each, 270 KB

As many samples make a batch as have room for their tensors. Where those of a single run have none, the graph is run for
some of the tensors after the other. What an interrupted run counted is kept in a file after whole batches, and the next
run goes on there; counts do not depend on where they were cut, so both end with the same ones.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.histogram import Histogram
from calibration.inference import Array, answer_only, as_float32, choose, feeds, fixed_batch, open_session
from calibration.padding import without_padded
from calibration.ranges import not_finite
from calibration.resume import Resume
from calibration.rows import Rows

_MIB = 1 << 20
_PREFIX = "gpusq.seen"
_FLOAT_BYTES = 4
_READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CollectOptions:
    """How tensors are collected.

    Attributes:
        batch: samples a run, at most; a model with a fixed batch size is run at that one.
        memory_mib: what the collected tensors of one run may take.
        resume: where an interrupted run is kept; None: nowhere.
    """

    batch: int = 8
    memory_mib: int = 256
    resume: Resume | None = None


@dataclass(frozen=True)
class _Run:
    """Tensors that are collected together, and how many samples at a time."""

    tensors: tuple[str, ...]
    batch: int


def collect(
    model: Path | ir.Model,
    tensors: Sequence[str],
    samples: Mapping[str, Rows],
    options: CollectOptions | None = None,
    *,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Histogram]:
    """Return the histogram of the magnitudes of each of `tensors` over all samples, computed in float32 on the CPU.

    The last batch of a model with a fixed batch size is filled up with the last sample, which then counts repeatedly.

    Args:
        model: a graph, which is not changed, or the path of an ONNX file.
        tensors: names of float tensors of the main graph: inputs, constants or outputs of nodes.
        samples: arrays [N, …] by input name, as the model takes them; they are read batch by batch.
        options: how much at a time, and where an interrupted run is kept; who gave that place clears it in the end.
        progress: is told the share that is done.

    Raises:
        GpusqError: an input has no samples, or a tensor became NaN or infinite: the first one that did is named.
        ValueError: the graph has no float tensor of a given name.
    """
    if not tensors:
        return {}
    options = options or CollectOptions()
    source = ir.load(model) if isinstance(model, Path) else model
    names = [str(value.name) for value in choose(source.graph, tensors)]
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "model.onnx"
        ir.save(source.clone(), stored, external_data="weights")  # once for all runs
        runs = _plan(stored, names, samples, options)
        found = _collected(source, stored, runs, samples, options.resume, progress)
    return {name: found[name] for name in tensors}


def _plan(stored: Path, names: Sequence[str], samples: Mapping[str, Rows], options: CollectOptions) -> list[_Run]:
    """Runs whose tensors have room, in the graph's order; a tensor that has none even alone gets a run of its own."""
    sizes, fixed = _sizes(stored, names, samples)
    room = options.memory_mib * _MIB // _FLOAT_BYTES
    batch = fixed or max(1, min(options.batch, room // max(sum(sizes.values()), 1)))
    groups: list[list[str]] = [[]]
    for name in names:
        if groups[-1] and batch * sum(sizes[other] for other in (*groups[-1], name)) > room:
            groups.append([])
        groups[-1].append(name)
    return [_Run(tuple(group), batch) for group in groups]


def _sizes(stored: Path, names: Sequence[str], samples: Mapping[str, Rows]) -> tuple[dict[str, int], int | None]:
    """How many elements of each tensor one sample makes; and how many samples the model takes, where that is fixed."""
    model = ir.load(stored)
    for index, value in enumerate(choose(model.graph, names)):
        node = ir.node("Size", [value], name=f"{_PREFIX}/{index}/Size")
        node.outputs[0].name, node.outputs[0].type = f"{node.name}:0", ir.TensorType(ir.DataType.INT64)
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    answer_only(model, list(model.graph.outputs)[-len(names) :])
    session = _session(model, stored)
    fixed = fixed_batch(session.get_inputs())
    found = session.run(None, next(feeds(session.get_inputs(), samples, 1)))
    return {name: -(-int(size) // (fixed or 1)) for name, size in zip(names, found, strict=True)}, fixed


def _collected(
    source: ir.Model,
    stored: Path,
    runs: Sequence[_Run],
    samples: Mapping[str, Rows],
    resume: Resume | None,
    progress: Callable[[float], None],
) -> dict[str, Histogram]:
    """The histograms of all runs; a batch is done when each of its tensors was counted."""
    found = {name: Histogram() for run in runs for name in run.tensors}
    key = _key(stored, runs, resume.samples_sha256) if resume else ""
    skipped = done = resume.load(key, found) if resume else 0
    of_each = -(-min(map(len, samples.values()), default=1) // runs[0].batch)
    for index, run in enumerate(runs):
        first = min(max(skipped - index * of_each, 0), of_each)
        for feed, outputs in _answers(stored, run, samples, first):
            for name, array in zip(run.tensors, outputs, strict=True):
                found[name].add(without_padded(array, feed))
                if not found[name].finite:
                    raise not_finite(source, feed, name)
            done += 1
            progress(done / (of_each * len(runs)))
            if resume:
                resume.save(key, found, done)
    return found


def _answers(
    stored: Path, run: _Run, samples: Mapping[str, Rows], first: int
) -> Iterator[tuple[dict[str, Array], Iterator[Array]]]:
    """Each batch from `first` on with the tensors of the run, which are gone when the next one is asked for."""
    import onnxruntime

    model = ir.load(stored)
    graph = model.graph
    answer_only(
        model,
        [
            value
            if value.dtype == ir.DataType.FLOAT and value.producer() is not None
            else as_float32(graph, value, f"{_PREFIX}/{index}/Cast")
            for index, value in enumerate(choose(graph, run.tensors))
        ],
    )
    session = _session(model, stored)
    names = [output.name for output in session.get_outputs()]

    for feed in feeds(session.get_inputs(), samples, run.batch, first):
        values = session.run_with_ort_values(
            names, {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        )
        yield feed, map(_where_it_lies, values)
        del values  # else they stay while those of the next batch are made


def _where_it_lies(value: Any) -> Array:
    """The elements of a float32 OrtValue, not copied: they are there as long as it is."""
    shape = value.shape()
    flat = (ctypes.c_float * math.prod(shape)).from_address(value.data_ptr())
    return np.ctypeslib.as_array(flat).reshape(shape)


def _session(model: ir.Model, stored: Path) -> Any:
    """A session of a graph that reads the weights of the one at `stored`."""
    path = stored.with_name("run.onnx")
    ir.save(model, path)
    return open_session(path)


def _key(stored: Path, runs: Sequence[_Run], samples_sha256: str) -> str:
    """What must be the same for a run to go on where another one ended."""
    import onnxruntime

    digest = hashlib.sha256(repr((runs, samples_sha256, onnxruntime.__version__)).encode())
    for file in sorted(stored.parent.iterdir()):
        if file.name != "run.onnx":
            with file.open("rb") as opened:
                while part := opened.read(_READ_AT_ONCE):
                    digest.update(part)
    return digest.hexdigest()
