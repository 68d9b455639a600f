"""The tables of the report: one function each, the same rows for the page and for Markdown.

A cell is text; what it means is its column's `kind`. The first column names the row.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from calibration.costly_layers import Found
from deploy.manifest import (
    Engine,
    FileEntry,
    Float16Check,
    Layer,
    Manifest,
    Measurement,
    Plan,
    Prediction,
    Sizes,
    Source,
    Timing,
    Verification,
)
from deploy.placement_choice import Choice
from deploy.report import formats
from exporters.passes.outcome import Outcome

Kind = Literal["text", "code", "number", "hash", "origin"]


@dataclass(frozen=True)
class Column:
    """A column's heading and what its cells hold."""

    name: str
    kind: Kind = "text"


@dataclass(frozen=True)
class Table:
    """A caption, columns, and rows of as many cells."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def verification(verified: Verification) -> Table:
    """How `model.onnx` compares with the PyTorch student."""
    rows = [
        ("samples", verified.samples),
        ("number of samples", formats.count(verified.count)),
        ("samples' SHA-256", verified.samples_sha256),
        ("labels", "yes" if verified.labelled else "none: accuracy itself was not checked"),
        ("runtime", verified.runtime),
        ("student's top-1", _share(verified.student_top1)),
        ("model.onnx's top-1", _share(verified.onnx_top1)),
        ("same top-1 class", _share(verified.agreement)),
        ("largest difference of two outputs", f"{verified.max_abs_difference:.3g}"),
    ]
    if verified.drop is not None:
        value, low, high = (f"{100 * x:+.1f}" for x in (verified.drop.value, verified.drop.low, verified.drop.high))
        rows.append(("points of top-1 lost [exact 95 %]", f"{value} [{low}, {high}]"))
    if verified.float16 is not None:
        rows.append(("with every operator in float16", _float16(verified.float16)))
    caption = "model.onnx against the PyTorch student, on the same samples"
    return Table(caption, (Column("figure"), Column("value")), tuple(rows))


def _float16(check: Float16Check) -> str:
    """ONNX's reference evaluator on some of the samples, since onnxruntime's CPU computes float16 in float32."""
    if check.max_abs_difference is None:
        return f"not finite on {formats.count(check.count)} samples: an operator overflows"
    return (
        f"finite; same class for {_share(check.agreement)} of {formats.count(check.count)} samples, "
        f"outputs within {check.max_abs_difference:.3g} (onnx.reference)"
    )


def latency(measured: Measurement) -> Table:
    """The p50 and p99 of both models, with their intervals."""
    columns = (Column("model"), Column("precision"), Column("p50 [95 %]", "number"), Column("p99 [95 %]", "number"))
    timings = [("student", measured.student)]
    if measured.baseline:
        timings.append(("baseline", measured.baseline))
    return Table(
        "Latency with 95 % bootstrap intervals", columns, tuple(_timing(role, timing) for role, timing in timings)
    )


def predictions(predicted: Iterable[Prediction]) -> Table:
    """The figures that were computed from a model of the device."""
    columns = (Column("figure"), Column("predicted", "number"), Column("how"))
    rows = tuple((p.what, f"{formats.significant(p.value)} {p.unit}".rstrip(), p.how) for p in predicted)
    return Table("Predicted, not measured", columns, rows)


def engines(built: Iterable[Engine], measured: Measurement | None) -> Table:
    """The engines of the bundle."""
    columns = (
        Column("file", "code"),
        Column("runtime"),
        Column("compiled for"),
        Column("timed"),
        Column("note"),
    )
    rows = tuple(
        (
            engine.file,
            f"{engine.runtime} {engine.runtime_version}",
            f"{engine.target}, a relative of the device" if engine.nearest else engine.target,
            "yes" if was_timed(engine.runtime, measured) else "no",
            engine.note,
        )
        for engine in built
    )
    return Table("Engines in the bundle", columns, rows)


def was_timed(runtime: str, measured: Measurement | None) -> bool:
    """Whether the measurement was taken with this runtime, named by the first word."""
    return measured is not None and measured.runtime.lower().split()[:1] == runtime.lower().split()[:1]


def gemms(plan: Plan) -> Table:
    """The GEMMs of the plan by type."""
    rows = tuple((formats.type_name(kind), formats.count(number)) for kind, number in plan.gemms_by_type.items())
    return Table("GEMMs by type", (Column("type"), Column("GEMMs", "number")), rows)


def attentions(plan: Plan) -> Table:
    """Whether each attention became one kernel."""
    rows = tuple((item.module, "one kernel" if item.fused else "not fused") for item in plan.attentions)
    return Table("Attention", (Column("module", "code"), Column("compiled to")), rows)


def blocks(plan: Plan) -> Table:
    """The kernels of each block."""
    rows = tuple((block, formats.count(number)) for block, number in plan.kernels_per_block.items())
    return Table("Kernels per block", (Column("block", "code"), Column("kernels", "number")), rows)


def kernels(plan: Plan) -> Table:
    """Every kernel, in the order in which it runs."""
    columns = (
        Column("no.", "number"),
        Column("kind"),
        Column("input types"),
        Column("modules", "code"),
        Column("kernel", "code"),
    )
    rows = tuple(
        (
            str(number),
            kernel.kind,
            ", ".join(map(formats.type_name, kernel.types)),
            ", ".join(kernel.modules),
            kernel.name,
        )
        for number, kernel in enumerate(plan.kernels, start=1)
    )
    return Table("Every kernel, in the order of the plan", columns, rows)


def layers(linears: Sequence[Layer], plan: Plan | None) -> Table:
    """The scales and the 2:4 state of each linear layer: eligible, chosen, and if not, why not."""
    columns = (
        Column("module", "code"),
        Column("K × N", "number"),
        Column("weight, activation"),
        Column("input scale", "number"),
        Column("weight scales", "number"),
        Column("pattern"),
        Column("zeros", "number"),
        Column("broken groups", "number"),
        Column("eligible"),
        Column("chosen"),
        Column("why not, or what is still asked"),
    )
    notes = shared_reasons(linears, plan)
    rows = tuple(_layer(layer, chosen, notes.get(why, why)) for layer, chosen, why in _steps(linears, plan))
    return Table("Linear layers of model.onnx", columns, rows)


def shared_reasons(linears: Sequence[Layer], plan: Plan | None) -> dict[str, str]:
    """The reasons that more than two layers share, each with the name of its note."""
    counts = Counter(why for _, _, why in _steps(linears, plan) if why)
    return {why: f"note {number}" for number, why in enumerate((w for w, n in counts.items() if n > 2), start=1)}


def reasons(notes: Mapping[str, str]) -> Table:
    """The reasons behind the notes."""
    rows = tuple((name, why) for why, name in notes.items())
    return Table("Why not, or what is still asked", (Column("note"), Column("reason")), rows)


def sizes(computed: Sizes) -> Table:
    """Bytes of the weights, in FP32 and compressed."""
    columns = (
        Column("what"),
        Column("FP32", "number"),
        Column("compressed", "number"),
        Column("ratio", "number"),
    )
    rows = (
        _size("2:4 layers' weights", computed.pruned_fp32, computed.pruned_compressed, computed.pruned_ratio),
        _size("every parameter, with scales", computed.total_fp32, computed.total_compressed, computed.total_ratio),
    )
    return Table("Bytes of the weights, computed from the tensors", columns, rows)


def mixed_precision(found: Found) -> Table:
    """The layers that stay float, and what each costs when it is quantized alone."""
    columns = (
        Column("layer", "code"),
        Column("error of the output, quantized alone", "number"),
        Column("of all products", "number"),
    )
    rows = tuple((one.name, formats.percent(one.error), formats.percent(one.cost)) for one in found.left)
    lost = f"{found.after:.2f} points lost on the samples, {found.before:.2f} with all quantized"
    return Table(f"Left float for the accuracy: {lost}, {found.target:g} allowed", columns, rows)


def placements(choice: Choice) -> Table:
    """The placements that were tried, with what is predicted of each and what it loses."""
    columns = (
        Column("placement", "code"),
        Column("ms, predicted", "number"),
        Column("80 % interval", "number"),
        Column("points lost", "number"),
        Column("kernels", "number"),
        Column("2:4 kernels", "number"),
        Column("refused"),
    )
    return Table(f"Placements tried at batch {choice.batch}: {choice.headline}", columns, choice.rows)


def surgery(passes: Iterable[Outcome]) -> Table:
    """What each pass changed."""
    columns = (Column("pass", "code"), Column("changed", "number"), Column("left alone", "number"))
    rows = tuple((p.name, formats.count(p.changed), formats.count(len(p.left_alone))) for p in passes)
    return Table("Passes over the graph, in order", columns, rows)


def left_alone(one: Outcome) -> Table:
    """What a pass did not change, and why."""
    rows = tuple((item.where, item.why) for item in one.left_alone)
    return Table(f"Left alone by {one.name}", (Column("where", "code"), Column("why")), rows)


def build(manifest: Manifest) -> Table:
    """How the bundle was made."""
    rows = (
        ("created", manifest.created),
        *([("ranges of activations", f"by {manifest.ranges_by}")] if manifest.ranges_by else []),
        ("gpusq", manifest.gpusq),
        ("profile", manifest.profile),
        ("device", manifest.device),
        ("precision asked for", manifest.precision_asked),
        ("precision built", manifest.precision),
        ("type of what is not quantized", manifest.float_type),
        ("ONNX opset", str(manifest.opset)),
    )
    return Table("Build", (Column("key"), Column("value")), rows)


def pairs(caption: str, values: Mapping[str, str]) -> Table:
    """A mapping as a table of two columns."""
    return Table(caption, (Column("key"), Column("value")), tuple(values.items()))


def checkpoint(role: str, source: Source) -> Table:
    """A checkpoint, how it was read and exported, and what its training wrote about itself."""
    rows = [
        ("file", source.file),
        ("SHA-256", source.sha256),
        ("model", source.model),
        ("parameters", formats.count(source.parameters)),
        *((key, text) for key, text in (("taken for", source.kind), ("exported by", source.way)) if text),
        *((f"not by {failed.way}", failed.reason) for failed in source.failed),
        *(("note", note) for note in source.notes),
        *((key, value if isinstance(value, str) else json.dumps(value)) for key, value in source.card.items()),
    ]
    return Table(f"{role}'s checkpoint", (Column("key"), Column("value")), tuple(rows))


def files(entries: Mapping[str, FileEntry]) -> Table:
    """The files of the bundle."""
    columns = (Column("file", "code"), Column("size", "number"), Column("SHA-256", "hash"))
    rows = tuple((name, formats.size(entry.bytes), entry.sha256) for name, entry in entries.items())
    return Table("Files of the bundle, besides its manifest and reports", columns, rows)


def _share(share: float | None) -> str:
    return "not known" if share is None else formats.percent(share)


def _timing(role: str, timing: Timing) -> tuple[str, ...]:
    return (
        f"{role}: {timing.name}",
        timing.precision,
        formats.milliseconds_interval(timing.p50_ms),
        formats.milliseconds_interval(timing.p99_ms),
    )


def _by_tensorrt(plan: Plan) -> bool:
    """Whether a builder made it that has sparse kernels to choose from: TensorRT's, not TensorRT-RTX's."""
    return plan.source.startswith("TensorRT ")


def _steps(linears: Iterable[Layer], plan: Plan | None) -> Iterator[tuple[Layer, str, str]]:
    """Each layer, whether a sparse kernel was chosen for it, and why not, or what is still asked."""
    compiled = {layer.module: layer for layer in plan.layers} if plan is not None and _by_tensorrt(plan) else {}
    for layer in linears:
        eligible, why = layer.sparsity.eligible, layer.sparsity.reason
        kernel = compiled.get(layer.module)
        if kernel is None:
            yield layer, "on the device" if eligible else formats.ABSENT, why
        elif eligible and not kernel.sparse:
            yield layer, "no", f"TensorRT took {kernel.kernel or 'no kernel that names it'}"
        else:
            yield layer, "yes" if kernel.sparse else "no", why


def _layer(layer: Layer, chosen: str, why: str) -> tuple[str, ...]:
    sparsity = layer.sparsity
    return (
        layer.module,
        f"{layer.k} × {layer.n}",
        f"{layer.weight_type}, {layer.activation_type}",
        formats.scale(layer.input_scale),
        formats.scale_range(layer.weight_scale_min, layer.weight_scale_max),
        "dense" if sparsity.pattern == "dense" else f"{sparsity.pattern}, axis {sparsity.axis}",
        formats.percent(sparsity.zeros),
        formats.count(sparsity.broken_groups),
        "yes" if sparsity.eligible else "no",
        chosen,
        why or formats.ABSENT,
    )


def _size(what: str, fp32: int, compressed: int, ratio: float) -> tuple[str, ...]:
    if not fp32:
        return (what, "none", "none", formats.ABSENT)
    return (what, formats.size(fp32), formats.size(compressed), formats.times(ratio))
