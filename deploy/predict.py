"""Predict the latency of a model on devices that are not here: its compiled kernels, timed by the cost model.

    MODEL ─ compiled with TensorRT-RTX at one batch ─► kernels ─► works, scaled to each batch ─► profiles.latency

A graph with a dynamic batch is compiled once, for the usual batch; the kernels of other batches are the same ones with
M and the activations scaled. Where the compiler is missing or refuses, deploy.fusion_model tells the kernels.
Everything that comes out is predicted; nothing is measured.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from deploy import tensorrt_api
from deploy.ahead_of_time import RUNTIME
from deploy.compiled_kernels import CompiledKernel, read_kernels
from deploy.fusion_model import fused_kernels
from deploy.graph_file import read_graph
from deploy.kernel_work import ModelWork, pruned_nodes, works_of
from deploy.manifest import FILE_NAME, MODEL_FILE, is_bundle, read_manifest
from deploy.prediction import KernelPoint, Point, Predicted, Ratio
from deploy.tensorrt_api import Built, ShapeRange
from deploy.usual_shapes import usual_shapes
from exporters.linears import find_linears
from exporters.module_names import MODULE_KEY
from exporters.placement import Placement
from exporters.signature import Input
from exporters.sparsity import sparsity_of
from profiles.cost_parameters import load_parameters
from profiles.device import AheadOfTime, Device, load_device
from profiles.errors import GpusqError
from profiles.interval import interval, speedup_interval
from profiles.latency import Latency, latency_of
from profiles.machine import Machine, machine_of
from profiles.what_if import int8_ms, sparse_ms
from profiles.work import Work

_log = logging.getLogger(__name__)
Precision = Literal["fp32", "fp16", "int8"]
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class CompiledWork:
    """A model's kernels for one device, at one batch.

    Attributes:
        works: what each computes and moves.
        kernels: the compiled kernels that they index.
        modules: the modules of each work.
        batch: the batch that it was compiled at.
        source: the compiler, or the fusion model and why.
    """

    works: tuple[ModelWork, ...]
    kernels: tuple[CompiledKernel, ...]
    modules: tuple[tuple[str, ...], ...]
    batch: int
    source: str

    def at(self, batch: int) -> list[Work]:
        """The works at another batch."""
        return [each.work.scaled(batch / self.batch) for each in self.works]


def predict(
    model: str | Path,
    profiles: Sequence[str | Device],
    *,
    batches: Sequence[int] = BATCHES,
    baseline: str | Path | None = None,
    precision: Precision | None = None,
    power_mode: str | None = None,
    inputs: Sequence[Input] = (),
) -> Predicted:
    """Predict the latency of `model` on each profile at each batch.

    Args:
        model: an ONNX file, or a bundle.
        profiles: names, aliases or paths of device profiles, or profiles themselves.
        batches: batch sizes.
        baseline: an ONNX file or a bundle to compare with, as it is.
        precision: types a float32 ONNX on the way; None takes the graph as it is.
        power_mode: of a Jetson.
        inputs: the shapes of inputs that vary in more than the batch.

    Raises:
        GpusqError: there is no such file or profile, a profile lacks a figure, or the compiler refused the model.
    """
    points: list[Point] = []
    kernels: list[KernelPoint] = []
    compiled: dict[tuple[Path, str], CompiledWork] = {}
    for name in profiles:
        device = name if isinstance(name, Device) else load_device(name)
        device = device if power_mode is None else device.at(power_mode)
        machine = machine_of(device)
        own = _compiled(Path(model), device, precision, inputs, compiled)
        other = None if baseline is None else _compiled(Path(baseline), device, None, inputs, compiled)
        for batch in batches:
            latency = latency_of(own.at(batch), machine, load_parameters())
            points.append(_point(device, machine, batch, latency, own, other))
            kernels += _kernel_points(device, batch, latency, own)
    return Predicted(
        model=Path(model).name,
        baseline=None if baseline is None else Path(baseline).name,
        precision=precision,
        source=", ".join(dict.fromkeys(each.source for each in compiled.values())),
        points=tuple(points),
        kernels=tuple(kernels),
    )


def check_predictable(device: Device) -> None:
    """Raise GpusqError where the latency on `device` cannot be predicted, whatever the model."""
    _target(device)
    machine_of(device)


def predict_point(model: Path, device: Device, batch: int, inputs: Sequence[Input] = ()) -> Point:
    """Predict the latency of an ONNX file on one device at one batch, the graph as it is.

    Args:
        model: the file.
        device: the profile.
        batch: the batch size.
        inputs: the shapes of inputs that vary in more than the batch.

    Raises:
        GpusqError: as of `predict`, or the compiler is there and refuses the graph.
    """
    machine, own = machine_of(device), compiled_work(model, device, None, inputs, must_compile=True)
    return _point(device, machine, batch, latency_of(own.at(batch), machine, load_parameters()), own, None)


def _point(
    device: Device, machine: Machine, batch: int, latency: Latency, own: CompiledWork, other: CompiledWork | None
) -> Point:
    parameters = load_parameters()
    low, high = interval(latency.ms, parameters.uncertainty, unmodelled=latency.unmodelled)
    works = own.at(batch)
    slower = None if other is None else latency_of(other.at(batch), machine, parameters).ms
    return Point(
        profile=device.name,
        device=device.title,
        power_mode=device.power_mode,
        batch=batch,
        latency_ms=latency.ms,
        low_ms=low,
        high_ms=high,
        throughput_per_s=1e3 * batch / latency.ms,
        bound_by=latency.bound_by,
        kernels=len(own.works),
        sparse_kernels=sum(time.sparse for time in latency.kernels),
        unmodelled_share=latency.unmodelled,
        speedup=None if slower is None else _ratio((slower, latency.ms)),
        int8=_ratio(int8_ms(works, machine, parameters)),
        sparse=_ratio(sparse_ms(works, machine, parameters)),
    )


def _ratio(ms: tuple[float, float] | None) -> Ratio | None:
    """The first beside the second, with its interval."""
    if ms is None:
        return None
    slow, fast = ms
    low, high = speedup_interval(slow / fast, load_parameters().uncertainty)
    return Ratio(value=slow / fast, low=low, high=high, baseline_ms=slow)


def _kernel_points(device: Device, batch: int, latency: Latency, own: CompiledWork) -> list[KernelPoint]:
    return [
        KernelPoint(
            profile=device.name,
            batch=batch,
            name=own.kernels[each.kernels[0]].name,
            kind=each.work.kind,
            number=each.work.number,
            modules=modules,
            latency_ms=time.us / 1e3,
            share=time.us / 1e3 / latency.ms,
            bound_by=time.bound_by,
            modelled=time.modelled,
        )
        for each, modules, time in zip(own.works, own.modules, latency.kernels, strict=True)
    ]


def _compiled(
    path: Path,
    device: Device,
    precision: Precision | None,
    inputs: Sequence[Input],
    known: dict[tuple[Path, str], CompiledWork],
) -> CompiledWork:
    """The kernels of `path`, compiled once for each compute capability and set of sparse kernels."""
    if is_bundle(path):
        _check_bundle(path, device)
        path = path / MODEL_FILE
    if not path.exists():
        raise GpusqError(f"no such file: {path}", hint="give an .onnx file, or a folder that convert wrote")
    target = _target(device)
    key = (path, f"{target.compute_capability} {precision} {device.sparse is not None}")
    if key not in known:
        known[key] = compiled_work(path, device, precision, inputs)
    return known[key]


def compiled_work(
    path: Path,
    device: Device,
    precision: Precision | None = None,
    inputs: Sequence[Input] = (),
    *,
    must_compile: bool = False,
) -> CompiledWork:
    """The kernels of the graph as it is, or typed; of surgery's float32 one where the compiler takes no such graph.

    Args:
        path: an ONNX file.
        device: compiled for its compute capability.
        precision: types a float32 graph on the way.
        inputs: the shapes of inputs that vary in more than the batch.
        must_compile: whether it is an error if the compiler, where it is there, refuses the graph.

    Raises:
        GpusqError: the surgery refused the graph, or an axis has no length.
    """
    if precision is None and _has_float32_attention(path):
        precision = "fp32"
    return _compile(path, device, _target(device), precision, inputs, must_compile)


def _has_float32_attention(path: Path) -> bool:
    """Whether it holds the Attention operator in float32, for which TensorRT has no kernel."""
    nodes = (node for node in read_graph(path).graph.all_nodes() if node.op_type == "Attention" and not node.domain)
    queries = (node.inputs[0] for node in nodes)
    return any(query is not None and query.dtype in (None, ir.DataType.FLOAT) for query in queries)


def _check_bundle(bundle: Path, device: Device) -> None:
    made_for = read_manifest(bundle).device_profile
    if made_for.ahead_of_time != device.ahead_of_time:
        raise GpusqError(
            f"{bundle} was made for {made_for.name}, whose kernels are not those of {device.name}",
            hint=f"gpusq predict {bundle / MODEL_FILE} --profile {device.name}, or see {bundle / FILE_NAME}",
        )


def _target(device: Device) -> AheadOfTime:
    if device.ahead_of_time is None or device.gpu is None:
        raise GpusqError(
            f"{device.name} is no GPU that the model of latency knows",
            hint="choose a GPU's profile: `gpusq profiles` lists them",
        )
    return device.ahead_of_time


def _compile(
    path: Path,
    device: Device,
    target: AheadOfTime,
    precision: Precision | None,
    inputs: Sequence[Input],
    must_compile: bool,
) -> CompiledWork:
    with tempfile.TemporaryDirectory() as folder:
        if precision is not None:
            path = typed_graph(path, device, precision, Path(folder) / path.name)
        graph = read_graph(path)
        batch, usual = usual_shapes(graph, inputs)
        kernels, source = _kernels(path, graph, target, batch, usual, must_compile)
        pruned = pruned_nodes(graph, device)
    works = tuple(works_of(kernels, pruned))
    module_of = {node.name or "": node.metadata_props.get(MODULE_KEY, "") for node in graph.graph}
    return CompiledWork(
        works=works,
        kernels=kernels,
        modules=tuple(_modules(each, kernels, module_of) for each in works),
        batch=_compiled_batch(graph, batch.usual),
        source=source,
    )


def _kernels(
    path: Path,
    graph: ir.Model,
    target: AheadOfTime,
    batch: ShapeRange,
    usual: Mapping[str, tuple[int, ...]],
    must_compile: bool,
) -> tuple[tuple[CompiledKernel, ...], str]:
    """The kernels, and where they come from: the compiler, or the fusion model where it is missing or refuses."""
    try:
        built = _built(path, target, batch, usual)
    except GpusqError as error:
        if must_compile and tensorrt_api.has_api(RUNTIME):
            raise
        _log.info("%s", error)
        return tuple(fused_kernels(graph, batch, usual)), f"the fusion model ({error.message})"
    near = ", a relative of the device" if target.nearest else ""
    source = f"TensorRT-RTX {built.runtime_version} for {target.compute_capability}{near}"
    return tuple(read_kernels(built.log)), source


def _built(path: Path, target: AheadOfTime, batch: ShapeRange, usual: Mapping[str, tuple[int, ...]]) -> Built:
    if not tensorrt_api.has_api(RUNTIME):
        raise GpusqError("TensorRT-RTX is not installed", hint="pip install tensorrt-rtx")
    fixed = ShapeRange(batch.usual, batch.usual, batch.usual)
    return tensorrt_api.build_engine(
        path, RUNTIME, compute_capability=target.compute_capability, batch=fixed, usual=usual
    )


def _modules(each: ModelWork, kernels: Sequence[CompiledKernel], module_of: dict[str, str]) -> tuple[str, ...]:
    nodes = (node for index in each.kernels for node in kernels[index].nodes)
    return tuple(dict.fromkeys(module for node in nodes if (module := module_of.get(node, ""))))


def _compiled_batch(graph: ir.Model, usual: int) -> int:
    """The length of the first axis of the first input, where that is fixed."""
    shape = graph.graph.inputs[0].shape if graph.graph.inputs else None
    first = shape[0] if shape else None
    return first if isinstance(first, int) and first > 0 else usual


def _has_pruned(model: ir.Model, device: Device) -> bool:
    """Whether a weight is 2:4 and the device has kernels for it, which the builder takes where INT8 is written too."""
    found = (sparsity_of(linear, None).pattern for linear in find_linears(model.graph))
    return device.sparse is not None and any(pattern == "2:4" for pattern in found)


def typed_graph(path: Path, device: Device, precision: Precision, out: Path) -> Path:
    """The graph as surgery types it; the scales do not matter to a latency, so any stand in for measured ones."""
    from exporters.graph_student import read_graph as read_student
    from exporters.save_onnx import save_onnx
    from exporters.surgery import Target, surgery

    model = read_student(path).export(scales=precision == "int8").model
    float_type = "float32" if precision == "fp32" else device.onnx.float_type
    placement: Placement = (
        "as-trained" if precision != "int8" else "sparse-int8" if _has_pruned(model, device) else "w8a8-linear"
    )
    target = Target(device, float_type, placement)
    surgery(model, target, lambda _, names: dict.fromkeys(names, 1.0))
    save_onnx(model, out)
    return out
