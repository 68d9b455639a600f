"""The report of two models beside each other: a verdict a metric, what is otherwise, and both plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deploy.compare import Comparison
from deploy.comparison.formats import change_of, figure_of
from deploy.comparison.metrics import Metric
from deploy.comparison.subject import Subject
from deploy.comparison.timings import Timings
from deploy.prediction import Predicted
from deploy.report import formats, plan_picture
from deploy.report.distributions import distribution
from deploy.report.document import (
    Block,
    Card,
    Document,
    Figure,
    Line,
    Origin,
    Section,
    Sentences,
    State,
    Tables,
    Words,
)
from deploy.report.drawing.bars import Bar, bars
from deploy.report.predicted_section import predicted_section
from deploy.report.tables import Column, Table

_STATES: dict[str, State] = {"pass": "good", "improvement": "good", "regression": "bad", "inconclusive": "open"}


def comparison_page(
    found: Comparison, sides: tuple[Subject, Subject], timings: Timings | str, predicted: Predicted | str, gpusq: str
) -> Document:
    """Return the report of a comparison.

    Args:
        found: the verdicts.
        sides: the baseline and the candidate.
        timings: the samples of both, or why there are none.
        predicted: the candidate's latency beside the baseline's, or why nothing is predicted.
        gpusq: the release that writes it.
    """
    return Document(
        subject=found.candidate,
        target=found.baseline,
        facts=(("allowed", f"{100 * found.max_regression:.3g} % worse"), ("by", f"gpusq {gpusq}")),
        cards=tuple(_cards(found, predicted)),
        lines=tuple(_line(metric) for metric in found.metrics),
        sections=tuple(_sections(found, sides, timings, predicted)),
        gpusq=gpusq,
        source=f"{found.baseline} and {found.candidate}",
        joint="beside",
    )


def _cards(found: Comparison, predicted: Predicted | str) -> Iterator[Card]:
    counts = [sum(metric.verdict == verdict for metric in found.metrics) for verdict in _STATES]
    words = tuple(f"{verdict}: {count}" for verdict, count in zip(_STATES, counts, strict=True) if count)
    yield Card("All metrics", found.verdict.capitalize(), words, _origin(found), _STATES[found.verdict], "metrics")
    worse = sum(difference.worse for difference in found.differences)
    headline = f"{len(found.differences)} differences" if found.differences else "No difference"
    lines = (f"{worse} of them worse",) if found.differences else ()
    yield Card("Plan and layers", headline, lines, "compiled", "bad" if worse else "open", "differences")
    point = None if isinstance(predicted, str) else predicted.points[0]
    if point is not None and point.speedup is not None:
        ratio = point.speedup
        below = (
            f"80 % interval {formats.significant(ratio.low)} to {formats.times(ratio.high)}",
            f"{point.device}, batch {point.batch}",
            "not measured",
        )
        yield Card("Speed", f"{formats.times(ratio.value)} as fast, predicted", below, "predicted", "open", "predicted")


def _origin(found: Comparison) -> Origin:
    """Of the metric that decides: the first with the verdict of all."""
    return next((metric.origin for metric in found.metrics if metric.verdict == found.verdict), "not here")


def _line(metric: Metric) -> Line:
    known = metric.baseline is not None
    figures = f"{figure_of(metric.baseline, metric.unit)} → {figure_of(metric.candidate, metric.unit)}"
    change = () if metric.worse is None else (f"worse by {change_of(metric.worse)}",)
    details = (figures, *change) if known else metric.reasons
    return Line(metric.metric, metric.verdict, _STATES[metric.verdict], metric.origin if known else "not here", details)


def _sections(
    found: Comparison, sides: tuple[Subject, Subject], timings: Timings | str, predicted: Predicted | str
) -> Iterator[Section]:
    yield Section("metrics", "Metrics", tuple(_metrics(found)))
    items = tuple((difference.sentence, difference.worse) for difference in found.differences)
    same: Block = Words("Nothing is otherwise in plan, quantizers, sparsity and scales.", "absence")
    yield Section("differences", "What is otherwise", (Sentences(items) if items else same,), "compiled")
    yield Section("latency", "Latency", tuple(_latency(found, timings)), _where(timings))
    yield predicted_section(predicted)
    plans = tuple(_plans(sides))
    yield Section("plan", "Plans", plans or (Words("No plan of both is known.", "absence"),), "compiled")
    yield Section("sizes", "Sizes", tuple(_sizes(sides)), "computed")


def _where(timings: Timings | str) -> Origin:
    return "measured" if isinstance(timings, Timings) else "not here"


def _metrics(found: Comparison) -> Iterator[Block]:
    columns = (
        Column("metric"),
        Column("baseline", "number"),
        Column("candidate", "number"),
        Column("worse by [95 %]", "number"),
        Column("origin", "origin"),
        Column("verdict"),
        Column("remarks"),
    )
    rows = tuple(
        (
            metric.metric,
            figure_of(metric.baseline, metric.unit),
            figure_of(metric.candidate, metric.unit),
            formats.ABSENT if metric.worse is None else change_of(metric.worse),
            "not here" if metric.baseline is None else metric.origin,
            metric.verdict,
            "; ".join(metric.reasons),
        )
        for metric in found.metrics
    )
    yield Tables((Table(f"{found.candidate} beside {found.baseline}", columns, rows),))
    for name, why in found.not_compared.items():
        yield Words(f"Not compared: {name}: {why}.", "note")


def _latency(found: Comparison, timings: Timings | str) -> Iterator[Block]:
    if isinstance(timings, str):
        yield Words(f"Not measured: {timings}.", "absence")
        return
    samples: dict[str, Sequence[float]] = {
        f"baseline: {found.baseline}": timings.baseline["latency_ms"].tolist(),
        f"candidate: {found.candidate}": timings.candidate["latency_ms"].tolist(),
    }
    yield distribution("latency-plot", samples, f"{timings.device}, batch {timings.batch}")


def _plans(sides: tuple[Subject, Subject]) -> Iterator[Block]:
    for role, side in zip(("baseline", "candidate"), sides, strict=True):
        if side.plan is not None and side.plan.kernels:
            yield Words(f"The {role}, {side.name}:")
            yield plan_picture.compiled(side.plan, f"plan-{role}")


def _sizes(sides: tuple[Subject, Subject]) -> Iterator[Block]:
    known = [(role, side.sizes) for role, side in zip(("baseline", "candidate"), sides, strict=True) if side.sizes]
    if not known:
        yield Words("The sizes are not known.", "absence")
        return
    totals = [(role, one.total_compressed) for role, one in known]
    rows = [Bar(role, total, formats.size(total), number) for number, (role, total) in enumerate(totals)]
    words = "Bytes of every parameter, compressed: " + "; ".join(f"{row.name} {row.figure}" for row in rows) + "."
    yield Figure("sizes-plot", bars(rows, words), words, "computed")
