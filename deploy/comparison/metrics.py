"""A verdict for each metric of two models.

| verdict | of a metric with samples: its 95 % interval of the change lies | of one without |
|---|---|---|
| regression | above the practical threshold | more than the threshold, or a fusion, an INT8 GEMM or 2:4 lost |
| improvement | below 0 | less |
| pass | below the threshold, not below 0 | the same, or worse by less than the threshold |
| inconclusive | on both sides of the threshold, or there is nothing to compare | nothing to compare |

p50, p99 and throughput are tested together: a regression is one whose p-value, adjusted by Holm for their number, is
below 2.5 % (one side of a 95 % interval).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from pydantic import Field

from deploy.comparison.subject import Subject
from deploy.comparison.timings import Timings
from deploy.manifest import Interval, Plan, Verification
from deploy.timing.statistics import Resampling, as_interval, holm, median, p99
from profiles.record import Record

MetricName = Literal["p50", "p99", "throughput", "accuracy", "size", "kernels", "peak-memory"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
TIMED: tuple[MetricName, ...] = ("p50", "p99", "throughput")
Verdict = Literal["pass", "regression", "improvement", "inconclusive"]
Origin = Literal["measured", "verified", "compiled", "computed"]
LEAST_DIFFERENCE = 0.001
_Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Gate:
    """What a candidate must keep.

    Attributes:
        max_regression: the share by which a metric may become worse.
        max_drop: by how much the accuracy, a share of the samples, may fall.
        metrics: which are asked; those that are must be found.
        last: of how many runs in the history.
        resampling: how intervals are made.
    """

    max_regression: float = 0.03
    max_drop: float = 0.01
    metrics: tuple[MetricName, ...] = ()
    last: int = 1
    resampling: Resampling = field(default_factory=Resampling)


class Metric(Record):
    """One metric of both."""

    metric: MetricName
    origin: Origin = Field(description="Where the figures come from.")
    unit: str
    baseline: float | None
    candidate: float | None
    worse: Interval | None = Field(description="Share by which the candidate is worse; negative where it is better.")
    p_value: float | None = Field(description="That it is not worse than allowed, adjusted by Holm; None if certain.")
    verdict: Verdict
    reasons: tuple[str, ...]


def metrics_of(before: Subject, after: Subject, gate: Gate, timings: Timings | str) -> Iterator[Metric]:
    """Yield the metrics that are known of both models; `timings` of both, or why there are none."""
    if isinstance(timings, Timings):
        yield from _timed(timings, gate)
    if before.error is not None and after.error is not None:
        unit = "difference from the reference, relative"
        yield _distance(unit, before.error, after.error, gate)
    elif before.verified is not None and after.verified is not None:
        yield _accuracy(before.verified, after.verified, gate)
    if before.sizes is not None and after.sizes is not None:
        yield _counted(
            "size", "bytes", before.sizes.total_compressed, after.sizes.total_compressed, gate, _lost(before, after)
        )
    if before.plan is not None and after.plan is not None:
        was, now = len(before.plan.kernels), len(after.plan.kernels)
        yield _counted("kernels", "kernels", was, now, gate, _unfused(before.plan, after.plan))
        memory = (_memory(before.plan), _memory(after.plan))
        if memory[0] is not None and memory[1] is not None:
            yield _counted("peak-memory", "bytes", memory[0], memory[1], gate)


def _timed(timings: Timings, gate: Gate) -> Iterator[Metric]:
    """The metrics that have samples, their p-values adjusted for their number."""
    names = [name for name in TIMED if not gate.metrics or name in gate.metrics]
    found = {name: timings.worse(name, gate.resampling) for name in names}
    limit = math.log1p(gate.max_regression)
    adjusted = holm([(1 + int((spread <= limit).sum())) / (1 + spread.size) for _, spread in found.values()])
    for name, p_value in zip(names, adjusted, strict=True):
        value, spread = found[name]
        change = as_interval(value, spread, gate.resampling)
        yield _timed_metric(name, timings, change, p_value, gate)


def _timed_metric(name: MetricName, timings: Timings, change: Interval, p_value: float, gate: Gate) -> Metric:
    quantity, unit = ("throughput_qps", "queries/s") if name == "throughput" else ("latency_ms", "ms")
    of = p99 if name == "p99" else median
    before, after = (float(of(side[quantity])) for side in (timings.baseline, timings.candidate))
    limit = math.log1p(gate.max_regression)
    how = "pair by pair" if timings.paired else "in runs of their own, so drift between them counts as a difference"
    return Metric(
        metric=name,
        origin="measured",
        unit=unit,
        baseline=before,
        candidate=after,
        worse=Interval(value=math.expm1(change.value), low=math.expm1(change.low), high=math.expm1(change.high)),
        p_value=p_value,
        verdict=verdict_of(change, p_value, limit, gate.resampling),
        reasons=(f"measured {how}, batch {timings.batch}, on {timings.device}, {timings.runs} runs",),
    )


def verdict_of(change: Interval, p_value: float, limit: float, how: Resampling) -> Verdict:
    """The verdict on a change, the log of the ratio by which it is worse, where `limit` is allowed."""
    if change.low > limit and p_value < (1 - how.confidence) / 2:
        return "regression"
    if change.high < 0:
        return "improvement"
    return "pass" if change.high <= limit else "inconclusive"


def _accuracy(before: Verification, after: Verification, gate: Gate) -> Metric:
    """Of labels where there are some, else of the agreement with the student, else of the answers themselves."""
    for name in ("onnx_top1", "agreement"):
        was, now = getattr(before, name), getattr(after, name)
        if was is not None and now is not None:
            return _share(name, was, now, (before.count, after.count), gate)
    was, now = (check.relative_difference for check in (before, after))
    if was is None or now is None:
        return not_known("accuracy", "the bundles hold no verification that can be compared")
    return _distance("largest difference from the student, as a share of its largest answer", was, now, gate)


def _distance(unit: str, was: float, now: float, gate: Gate) -> Metric:
    """A difference from a reference; what it grows by counts from a thousandth of the reference on."""
    share = now / was - 1 if was else float(now > 0)
    counts = abs(now - was) > LEAST_DIFFERENCE
    verdict: Verdict = "pass"
    if counts and share > gate.max_regression:
        verdict = "regression"
    elif counts and share < 0:
        verdict = "improvement"
    return _exact("accuracy", "verified", unit, (was, now, share), verdict, (unit,))


def _share(name: str, was: float, now: float, counts: tuple[int, int], gate: Gate) -> Metric:
    drop = newcombe(was, now, counts)
    if drop.low > gate.max_drop:
        verdict: Verdict = "regression"
    elif drop.high < 0:
        verdict = "improvement"
    else:
        verdict = "pass" if drop.value <= gate.max_drop else "inconclusive"
    return Metric(
        metric="accuracy",
        origin="verified",
        unit="top-1" if name == "onnx_top1" else "agreement with the student",
        baseline=was,
        candidate=now,
        worse=drop,
        p_value=None,
        verdict=verdict,
        reasons=(f"{counts[0]} and {counts[1]} samples; the interval takes them for different ones",),
    )


def newcombe(first: float, second: float, counts: tuple[int, int]) -> Interval:
    """The difference of two shares with its 95 % interval (Newcombe 1998, method 10: from Wilson's intervals)."""
    (low1, high1), (low2, high2) = (_wilson(p, n) for p, n in zip((first, second), counts, strict=True))
    down = math.hypot(first - low1, high2 - second)
    up = math.hypot(high1 - first, second - low2)
    return Interval(value=first - second, low=first - second - down, high=first - second + up)


def _wilson(share: float, count: int) -> tuple[float, float]:
    center = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return center - half, center + half


def _counted(name: MetricName, unit: str, was: int, now: int, gate: Gate, broken: Sequence[str] = ()) -> Metric:
    """A metric that is certain; what is `broken` makes it a regression however small the number."""
    share = now / was - 1 if was else 0.0
    if broken or share > gate.max_regression:
        verdict: Verdict = "regression"
    else:
        verdict = "improvement" if share < 0 else "pass"
    origin: Origin = "computed" if name == "size" else "compiled"
    return _exact(name, origin, unit, (was, now, share), verdict, tuple(broken))


def _exact(
    name: MetricName,
    origin: Origin,
    unit: str,
    figures: tuple[float, float, float],
    verdict: Verdict,
    reasons: tuple[str, ...],
) -> Metric:
    """A metric without samples: the baseline's figure, the candidate's, and the share by which it is worse."""
    was, now, share = figures
    return Metric(
        metric=name,
        origin=origin,
        unit=unit,
        baseline=was,
        candidate=now,
        worse=Interval(value=share, low=share, high=share),
        p_value=None,
        verdict=verdict,
        reasons=reasons,
    )


def _lost(before: Subject, after: Subject) -> list[str]:
    """The layers that were 2:4 and are not."""
    was = {layer.module for layer in before.layers if layer.sparsity.pattern != "dense"}
    return [f"{x.module} is no longer 2:4" for x in after.layers if x.sparsity.pattern == "dense" and x.module in was]


def _unfused(before: Plan, after: Plan) -> list[str]:
    fused = {(attention.module, attention.node) for attention in before.attentions if attention.fused}
    lost = [x.module for x in after.attentions if not x.fused and (x.module, x.node) in fused]
    found = [f"the attention of {module} is no longer fused" for module in lost]
    if after.linear_gemms_int8 < before.linear_gemms_int8:
        found.append(f"{before.linear_gemms_int8 - after.linear_gemms_int8} linear layers lost their INT8 GEMM")
    return found


def _memory(plan: Plan) -> int | None:
    known = [size for size in (plan.weights_bytes, plan.scratch_bytes) if size is not None]
    return sum(known) if known else None


def not_known(name: MetricName, why: str) -> Metric:
    """A metric that was asked for and of which nothing is known."""
    return Metric(
        metric=name,
        origin="measured",
        unit="",
        baseline=None,
        candidate=None,
        worse=None,
        p_value=None,
        verdict="inconclusive",
        reasons=(why,),
    )
