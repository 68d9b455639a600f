"""The verdicts at the top of the report, in words that say no more than was found.

Each card names the origin of its figures. `good` and `bad` are said only where the manifest settles the question;
`open` is a question that stays open, `absent` a step that did not happen here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath

from deploy.gates import MIN_AGREEMENT, not_judged, small_floats
from deploy.layers import noun
from deploy.manifest import Engine, Layer, Manifest, Measurement, Plan, Sizes, Verification
from deploy.report import formats
from deploy.report.document import Card, State
from deploy.report.tables import was_timed

KEPT_WITHIN = 0.005
"""An accuracy is called kept if, with 95 % confidence, at most this much of top-1 was lost."""

PLAN_PROVES = (
    "The plan proves which types the kernels take and what was fused. It says nothing about time, "
    "nor whether a kernel uses the 2:4 pattern."
)


def cards(manifest: Manifest) -> tuple[Card, ...]:
    """Return the verdicts on the bundle, in the order of the report."""
    return (
        _accuracy(manifest.verified),
        _speed(manifest.measured),
        _plan(manifest),
        _sparsity(manifest.layers, manifest.engines),
        _size(manifest.sizes),
        _engine(manifest),
    )


def student_name(manifest: Manifest) -> str:
    """Return the student's name: its checkpoint's, without the suffix."""
    return PurePath(manifest.student.file).stem


def precision(manifest: Manifest) -> str:
    """Return the precision that was built, and the one asked for where it differs."""
    if manifest.precision == manifest.precision_asked:
        return manifest.precision
    return f"{manifest.precision} (asked for: {manifest.precision_asked})"


def speed(measured: Measurement) -> str:
    """Return the verdict of a measurement as a sentence."""
    if measured.speedup is None:
        return "No baseline was measured, so nothing is said about being faster or slower."
    ratio = (
        f"The baseline's latency divided by the student's is {formats.times_interval(measured.speedup)}: "
        f"the median over {formats.count(measured.pairs)} interleaved pairs, with its 95 % bootstrap interval."
    )
    meaning = {
        "faster": "Verdict: the student is faster than the baseline.",
        "slower": "Verdict: the student is slower than the baseline.",
        "inconclusive": f"Verdict: inconclusive. {_why_undecided(measured)}",
        "no baseline": "Verdict: none.",
    }
    return f"{meaning[measured.verdict]} {ratio}"


def _why_undecided(measured: Measurement) -> str:
    """Return why nothing is said of a speed-up that was measured."""
    if measured.broken:
        return f"The run is not used, since {'; '.join(measured.broken)}."
    floor = measured.noise_floor
    within = (
        "" if floor is None else f": the interval reaches within {formats.percent(floor)} of 1, where equals may lie"
    )
    return f"These samples show the student neither faster nor slower{within}."


def conditions(measured: Measurement) -> str:
    """Return where and how the latencies were taken."""
    threads = "1 thread" if measured.threads == 1 else f"{measured.threads} threads"
    return f"{measured.runtime}, {threads}, batch {measured.batch}, {formats.count(measured.pairs)} pairs"


def chosen(layers: Iterable[Layer], engines: Iterable[Engine] = ()) -> str:
    """Return what is known about the sparse kernels: eligible is not chosen."""
    for engine in engines:
        if engine.sparse_chosen is not None:
            return (
                f"TensorRT chose sparse kernels for {engine.sparse_chosen} layers, says its log on {engine.built_on}."
            )
    if any(layer.sparsity.eligible for layer in layers):
        return (
            "Eligible is not chosen: which eligible layers run on sparse kernels is decided by TensorRT on the device."
        )
    return "No layer is eligible for sparse kernels of this target."


def plan(compiled: Plan, engines: Iterable[Engine]) -> str:
    """Return what the plan is, what it proves and what it does not."""
    text = f"Compiled for {_target(compiled, engines)}, read back from {compiled.source}. {PLAN_PROVES}"
    memory = {"weights": compiled.weights_bytes, "scratch memory": compiled.scratch_bytes}
    known = [f"{what} {formats.size(number)}" for what, number in memory.items() if number is not None]
    return f"{text} Said by the compiler: {', '.join(known)}." if known else text


def sizes(computed: Sizes) -> str:
    """Return what the sizes are computed from."""
    return (
        f"Computed from the model's tensors, not the size of a file. The 2:4 layers' scales add "
        f"{formats.size(computed.scales)} in FP32; they are counted in the whole, not in the 2:4 layers."
    )


def arithmetic(layers: Iterable[Layer]) -> tuple[str, ...]:
    """Return the compressed bits of a weight, one line for each type among the 2:4 layers (GPUSQ-ViT, section 3.1)."""
    types = dict.fromkeys(layer.weight_type for layer in layers if layer.sparsity.pattern == "2:4")
    return tuple(_arithmetic(name) for name in types)


def _arithmetic(weight_type: str) -> str:
    digits = re.search(r"\d+", weight_type)
    if digits is None:
        return f"{weight_type}: not a type with a width, so no arithmetic is given."
    bits = int(digits.group())
    group = 2 * bits + 2 * 2
    return (
        f"A 2:4 {weight_type} group of four = 2 values × {bits} bit + 2 indices × 2 bit = {group} bit, "
        f"or {group / 4:g} bit per weight. Against FP32: 32 / {group / 4:g} = {formats.times(32 / (group / 4))}."
    )


def _accuracy(verified: Verification | None) -> Card:
    if verified is None:
        why = "model.onnx was not compared with the student"
        return Card("Accuracy", "Not verified here", (why,), "not here", "absent", "accuracy")
    headline, state = _kept(verified)
    lines = (
        _agreement(verified),
        _top1(verified),
        f"verified with {verified.runtime}",
    )
    return Card("Accuracy", headline, lines, "verified", state, "accuracy")


def _kept(verified: Verification) -> tuple[str, State]:
    """The headline. An accuracy is called kept only if the interval of what was lost says so."""
    if verified.float16 is not None and not verified.float16.finite:
        return "Overflows in float16", "bad"
    if verified.agreement is None:
        return f"Output within {_relative(verified)} of its largest value", "open"
    if verified.drop is None:
        if verified.agreement == 1:
            return "Same class for every sample", "good"
        return f"Same class for {formats.percent(verified.agreement)}", "open"
    drop = verified.drop
    if drop.low > 0:
        return f"{formats.points(drop.value)} lower", "bad"
    if drop.high <= KEPT_WITHIN and verified.agreement >= MIN_AGREEMENT:
        return "Accuracy kept", "good"
    return f"Undecided: up to {formats.points(drop.high)} lower", "open"


def _agreement(verified: Verification) -> str:
    on = f"on {formats.count(verified.count)} samples"
    if verified.agreement is None:
        return f"largest difference {verified.max_abs_difference:.3g} {on}"
    return f"agreement {formats.percent(verified.agreement)} {on}"


def _relative(verified: Verification) -> str:
    relative = verified.relative_difference
    return "an unknown share" if relative is None else f"{100 * relative:.2g} %"


def _top1(verified: Verification) -> str:
    if verified.agreement is None:
        return "the output has no classes: no accuracy was checked"
    if verified.student_top1 is None or verified.onnx_top1 is None:
        return "no labels: accuracy itself was not checked"
    return f"top-1 {formats.percent(verified.onnx_top1)}, the student's {formats.percent(verified.student_top1)}"


def _sparsity(layers: tuple[Layer, ...], engines: tuple[Engine, ...]) -> Card:
    if not layers:
        return Card("2:4 sparsity", "No linear layers", (), "computed", "absent", "sparsity")
    sparse = [layer for layer in layers if layer.sparsity.pattern == "2:4"]
    eligible = sum(layer.sparsity.eligible for layer in layers)
    share = sum(layer.k * layer.n for layer in sparse) / sum(layer.k * layer.n for layer in layers)
    lines = (
        f"they hold {formats.percent(share)} of the linear weights",
        f"eligible for sparse kernels: {eligible}",
        _chosen(eligible, engines),
    )
    state: State = "good" if sparse and eligible == len(sparse) else "open"
    return Card("2:4 sparsity", f"{len(sparse)} of {len(layers)} {noun(layers)}", lines, "computed", state, "sparsity")


def _chosen(eligible: int, engines: tuple[Engine, ...]) -> str:
    counts = [engine.sparse_chosen for engine in engines if engine.sparse_chosen is not None]
    if counts:
        return f"chosen by TensorRT: {counts[-1]}"
    return "chosen: decided by TensorRT on the device" if eligible else "chosen: none can be"


def _target(plan: Plan, engines: Iterable[Engine]) -> str:
    relative = any(engine.nearest and engine.target == plan.target for engine in engines)
    return f"{plan.target}, a relative of the device" if relative else plan.target


def _plan(manifest: Manifest) -> Card:
    plan = manifest.plan
    layers = [layer for layer in manifest.layers if layer.kind == "gemm"]
    if plan is None:
        return Card("Plan", "Not built here", ("nothing was compiled",), "not here", "absent", "plan")
    quantized = sum(layer.weight_type == layer.activation_type == "int8" for layer in layers)
    fused = sum(item.fused for item in plan.attentions)
    lines: tuple[str, ...] = (
        f"{fused} of {len(plan.attentions)} attentions fused" if plan.attentions else "no attention in it",
        f"{formats.count(len(plan.kernels))} kernels",
        f"compiled for {_target(plan, manifest.engines)}"
        + ("" if was_timed(plan.source, manifest.measured) else "; not timed"),
    )
    if quantized < len(layers):
        lines = (f"model.onnx asks for {quantized}", *lines)
    lines = (*lines, *not_judged(plan))
    good = plan.linear_gemms_int8 >= quantized and plan.linear_gemms == len(layers) and fused == len(plan.attentions)
    headline = f"{plan.linear_gemms_int8} of {len(layers)} linears INT8"
    for name, count, wanted in small_floats(plan):
        headline, good = f"{count} of {wanted} layers {name}", good and count == wanted
    return Card("Plan", headline, lines, "compiled", "good" if good else "bad", "plan")


def _speed(measured: Measurement | None) -> Card:
    if measured is None:
        return Card("Speed", "Not measured", ("needs the device",), "not here", "absent", "latency")
    lines: tuple[str, ...] = (
        f"p50 {formats.milliseconds(measured.student.p50_ms.value)}, "
        f"p99 {formats.milliseconds(measured.student.p99_ms.value)}",
        f"measured on {measured.device}",
        conditions(measured),
    )
    if measured.baseline:
        lines = (f"against {measured.baseline.name}, {measured.baseline.precision}", *lines)
    lines = (*lines, *(f"not used: {reason}" for reason in measured.broken))
    headline, state = _speed_headline(measured)
    return Card("Speed", headline, lines, "measured", state, "latency")


def _speed_headline(measured: Measurement) -> tuple[str, State]:
    if measured.speedup is None:
        return f"p50 {formats.milliseconds(measured.student.p50_ms.value)}, no baseline", "open"
    ratio = formats.times_interval(measured.speedup)
    states: dict[str, State] = {"faster": "good", "slower": "bad"}
    return f"{measured.verdict.capitalize()}: {ratio}", states.get(measured.verdict, "open")


def _size(sizes: Sizes) -> Card:
    if not sizes.pruned_fp32:
        return Card("Size", "No 2:4 layers", ("nothing to compress",), "computed", "absent", "sizes")
    lines = (
        f"2:4 layers: {formats.size(sizes.pruned_fp32)} in FP32 → {formats.size(sizes.pruned_compressed)}",
        f"every parameter: {formats.times(sizes.total_ratio)} smaller",
    )
    return Card("Size", f"2:4 weights {formats.times(sizes.pruned_ratio)} smaller", lines, "computed", "good", "sizes")


def _engine(manifest: Manifest) -> Card:
    missing = tuple(f"missing: {item.what}" for item in manifest.missing)
    if not manifest.engines:
        return Card("Engine", "Not built here", missing, "not here", "absent", "plan")
    lines = tuple(_engine_line(engine, manifest.measured) for engine in manifest.engines)
    targets = " and ".join(Counter(engine.target for engine in manifest.engines))
    state: State = "open" if missing or any(engine.nearest for engine in manifest.engines) else "good"
    return Card("Engine", f"Built for {targets}", lines + missing, "compiled", state, "plan")


def _engine_line(engine: Engine, measured: Measurement | None) -> str:
    built = f"{engine.runtime} {engine.runtime_version}"
    if engine.nearest:
        built += f" for {engine.target}, a relative of the device"
    return built if was_timed(engine.runtime, measured) else f"{built}: compiled, not timed"
