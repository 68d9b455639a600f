"""Is the candidate worse than the baseline? One verdict for each metric, and why, in the names of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from deploy.comparison.explain import Difference, differences
from deploy.comparison.metrics import METRICS, TIMED, Gate, Metric, MetricName, Verdict, metrics_of, not_known
from deploy.comparison.subject import Subject, read_subject
from deploy.comparison.timings import Timings, find_timings
from deploy.manifest import Plan
from deploy.timing.history import DEFAULT
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1


class Comparison(Record):
    """A candidate beside its baseline."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    baseline: str
    candidate: str
    max_regression: float
    verdict: Verdict
    metrics: tuple[Metric, ...]
    differences: tuple[Difference, ...]
    not_compared: dict[str, str] = Field(description="Metrics that were not asked for, and why nothing is known.")


def compare(
    baseline: str,
    candidate: str,
    gate: Gate | None = None,
    *,
    profile: str | None = None,
    reference: Path | None = None,
    db: Path = DEFAULT,
) -> Comparison:
    """Compare two bundles, ONNX files or results of a history.

    Args:
        baseline: a path, or `gpusq.db:NAME`.
        candidate: the same.
        gate: what must be kept.
        profile: the device that ONNX files are compiled for.
        reference: an ONNX file whose answers both are held to.
        db: the history that the timings of bundles and ONNX files are looked up in.

    Raises:
        GpusqError: one of them cannot be read, or is for another device.
    """
    gate = gate or Gate()
    before, after = (read_subject(given, profile, reference) for given in (baseline, candidate))
    return compare_subjects(before, after, gate, find_timings(before, after, db, gate.last))


def compare_subjects(before: Subject, after: Subject, gate: Gate, timings: Timings | str = "") -> Comparison:
    """Compare what is known of two models; `timings` of both, or why there are none."""
    _check_plans(before.plan, after.plan)
    found = {metric.metric: metric for metric in metrics_of(before, after, gate, timings)}
    missing = {name: _why_missing(name, before, after, timings) for name in METRICS if name not in found}
    asked = [not_known(name, missing[name]) for name in gate.metrics if name in missing]
    metrics = [found[name] for name in METRICS if name in found and (not gate.metrics or name in gate.metrics)]
    return Comparison(
        baseline=before.name,
        candidate=after.name,
        max_regression=gate.max_regression,
        verdict=_overall([*metrics, *asked]),
        metrics=(*metrics, *asked),
        differences=differences(before, after),
        not_compared={} if gate.metrics else {str(name): why for name, why in missing.items()},
    )


def _check_plans(before: Plan | None, after: Plan | None) -> None:
    if before is not None and after is not None and before.target != after.target:
        raise GpusqError(
            f"the baseline was compiled for {before.target}, the candidate for {after.target}",
            hint="compare bundles of one profile",
        )


def _why_missing(name: MetricName, before: Subject, after: Subject, timings: Timings | str) -> str:
    if name in TIMED:
        return timings if isinstance(timings, str) else "not asked for"
    lacking = {"accuracy": "verified", "size": "sizes", "kernels": "plan", "peak-memory": "plan"}[name]
    sides = [side.name for side in (before, after) if getattr(side, lacking) is None]
    what = {"verified": "verification", "sizes": "graph", "plan": "plan"}[lacking]
    return f"no {what} of {' and '.join(sides)}" if sides else "the compiler tells no memory"


def _overall(metrics: Sequence[Metric]) -> Verdict:
    found = [metric.verdict for metric in metrics]
    order: tuple[Verdict, ...] = ("regression", "inconclusive", "improvement", "pass")
    return next((verdict for verdict in order if verdict in found), "inconclusive")
