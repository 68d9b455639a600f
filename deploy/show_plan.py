"""Show what a device's compiler made of a graph: a model is compiled ahead of time, a bundle holds its plan already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
from pydantic import Field

from deploy import tensorrt_api
from deploy.ahead_of_time import RUNTIME, Compiled, compile_ahead
from deploy.gates import not_judged
from deploy.graph_file import read_graph
from deploy.manifest import BlockAttention, Kernel, Plan, is_bundle, read_manifest
from deploy.text_table import text_table
from deploy.usual_shapes import usual_shapes
from exporters.signature import Input
from profiles.device import AheadOfTime, Device, load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
_HEADING = ("", "kind", "types", "read", "written", "modules", "kernel")
_NAME = 48
_FLOAT32 = ir.DataType.FLOAT


class ShownPlan(Record):
    """The plan of a model or a bundle for a device."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model: str
    profile: str
    device: str
    nearest: bool = Field(description="True where it was compiled for a relative of the device.")
    plan: Plan

    def to_text(self) -> str:
        """The plan for the terminal: what it amounts to, then each kernel."""
        near = ", the device's nearest relative" if self.nearest else ""
        return "\n".join(
            [
                f"{self.model} for {self.device}: {self.plan.source}, {self.plan.target}{near}",
                "",
                *_summary(self.plan),
                "",
                text_table([_HEADING, *(_row(index, k) for index, k in enumerate(self.plan.kernels, start=1))]),
            ]
        )


def show_plan(path: Path, profile: str | None = None, inputs: Sequence[Input] = ()) -> ShownPlan:
    """Return the plan of the bundle at `path`, or compile the ONNX model at `path` for `profile`.

    Args:
        path: an ONNX file, or a bundle, whose manifest holds its plan.
        profile: the device; a bundle knows its own.
        inputs: the usual shapes of a model's inputs.

    Raises:
        GpusqError: there is no such file, the profile has no compiler here, or the compiler refused the model.
    """
    if is_bundle(path):
        return _of_bundle(path, profile)
    if not path.exists():
        raise GpusqError(f"no such file: {path}", hint="give an .onnx file, or a folder that convert wrote")
    if profile is None:
        raise GpusqError(f"no profile to compile {path.name} for", hint="add --profile, such as --profile a100")
    device = load_device(profile)
    target = _target(device)
    compiled = _compile(path, target, inputs)
    return ShownPlan(
        model=path.name, profile=device.name, device=device.title, nearest=target.nearest, plan=compiled.plan
    )


def _of_bundle(bundle: Path, profile: str | None) -> ShownPlan:
    manifest = read_manifest(bundle)
    device = manifest.device_profile
    if profile is not None and load_device(profile).name != device.name:
        raise GpusqError(
            f"{bundle} was made for {device.name}, not for {profile}",
            hint=f"gpusq plan {bundle / 'model.onnx'} --profile {profile}",
        )
    if manifest.plan is None:
        raise GpusqError(f"{bundle} holds no plan: it was converted without a compiler", hint=_why_none(device))
    nearest = any(engine.nearest and engine.target == manifest.plan.target for engine in manifest.engines)
    return ShownPlan(model=bundle.name, profile=device.name, device=device.title, nearest=nearest, plan=manifest.plan)


def _why_none(device: Device) -> str:
    if device.ahead_of_time is None:
        return "TensorRT-RTX cannot compile for this device on another machine"
    return "pip install tensorrt-rtx, and convert again"


def _target(device: Device) -> AheadOfTime:
    if device.ahead_of_time is None:
        raise GpusqError(
            f"nothing compiles for {device.title} ahead of time",
            hint="choose a GPU's profile (`gpusq profiles`); a bundle's plan is shown by `gpusq plan BUNDLE`",
        )
    if not tensorrt_api.has_api(RUNTIME):
        raise GpusqError(
            f"compiling for {device.title} ahead of time needs TensorRT-RTX", hint="pip install tensorrt-rtx"
        )
    return device.ahead_of_time


def _compile(path: Path, target: AheadOfTime, inputs: Sequence[Input]) -> Compiled:
    graph = read_graph(path)
    batch, usual = usual_shapes(graph, inputs)
    try:
        return compile_ahead(path, target, batch=batch, usual=usual, graph=graph)
    except GpusqError as error:
        without_kernel = next(filter(_is_float32_attention, graph.graph.all_nodes()), None)
        if without_kernel is None or "ttention" not in error.message:
            raise
        raise GpusqError(
            f"{path.name}: TensorRT has no float32 kernel for the Attention operator, such as {without_kernel.name!r}",
            hint=f"run `gpusq surgery {path.name}` first: it types the graph, or writes its attention with MatMul",
        ) from error


def _is_float32_attention(node: ir.Node) -> bool:
    query = node.inputs[0] if node.op_type == "Attention" and not node.domain else None
    return query is not None and query.dtype in (None, _FLOAT32)


def _summary(plan: Plan) -> Iterator[str]:
    yield f"kernels       {len(plan.kernels)}: {_counts(Counter(kernel.kind for kernel in plan.kernels))}"
    yield f"GEMMs         {_counts(plan.gemms_by_type)}"
    yield f"  of linears  {plan.linear_gemms_int8} of {plan.linear_gemms} INT8"
    if plan.convolutions:
        types = _counts(plan.convolutions_by_type)
        yield f"convolutions  {plan.convolutions_int8} of {plan.convolutions} INT8; kernels: {types}"
    yield from (f"  not judged  {left}" for left in not_judged(plan))
    if plan.attentions:
        fused = sum(attention.fused for attention in plan.attentions)
        yield f"attentions    {fused} of {len(plan.attentions)} fused"
        yield from (f"  not fused   {_where(attention)}" for attention in plan.attentions if not attention.fused)
    if plan.kernels_per_block:
        yield f"per block     {', '.join(_per_block(plan.kernels_per_block))}"
    if plan.bytes_moved is not None:
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in plan.sizes.items())
        yield f"bytes moved   {plan.bytes_moved:,} for {shapes}"
    for label, size in (("weights", plan.weights_bytes), ("scratch", plan.scratch_bytes)):
        if size is not None:
            yield f"{label:13} {size:,} bytes"


def _per_block(kernels: Mapping[str, int]) -> Iterator[str]:
    """How many blocks have how many kernels, and which of them where there are but a few."""
    for number in sorted(set(kernels.values())):
        blocks = [block for block, count in kernels.items() if count == number]
        yield f"{number} in {' and '.join(blocks) if len(blocks) < 3 else f'{len(blocks)} blocks'}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def _where(attention: BlockAttention) -> str:
    return f"{attention.module} ({attention.node})" if attention.node else attention.module


def _row(index: int, kernel: Kernel) -> tuple[str, ...]:
    read, written = (dict.fromkeys(types) for types in (kernel.operands or kernel.types, kernel.outputs))
    return (
        str(index),
        kernel.kind,
        " → ".join("×".join(types) for types in (read, written) if types),
        "" if kernel.bytes_in is None else f"{kernel.bytes_in:,}",
        "" if kernel.bytes_out is None else f"{kernel.bytes_out:,}",
        _shortened(kernel.modules),
        kernel.name if len(kernel.name) <= _NAME else f"{kernel.name[: _NAME - 1]}…",
    )


def _shortened(modules: Sequence[str]) -> str:
    return f"{modules[0]} +{len(modules) - 1}" if len(modules) > 1 else "".join(modules)
