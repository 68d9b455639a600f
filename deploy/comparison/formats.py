"""A comparison as Markdown for a pull request, as JUnit XML for a CI service, and as a job's summary on GitHub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from deploy.compare import Comparison
from deploy.comparison.metrics import Metric
from deploy.manifest import Interval

_SUMMARY = "GITHUB_STEP_SUMMARY"
_MOST = 20


def to_markdown(found: Comparison) -> str:
    """The comparison as Markdown."""
    return "\n".join(_lines(found)) + "\n"


def to_junit(found: Comparison) -> str:
    """The comparison as JUnit XML: a test case a metric; a regression fails, what is inconclusive is skipped."""
    failed = sum(metric.verdict == "regression" for metric in found.metrics)
    skipped = sum(metric.verdict == "inconclusive" for metric in found.metrics)
    suite = ElementTree.Element(
        "testsuite",
        name=f"gpusq compare {found.baseline} {found.candidate}",
        tests=str(len(found.metrics)),
        failures=str(failed),
        skipped=str(skipped),
    )
    explained = "\n".join(difference.sentence for difference in found.differences)
    for metric in found.metrics:
        case = ElementTree.SubElement(suite, "testcase", classname="gpusq.compare", name=metric.metric)
        if metric.verdict == "regression":
            ElementTree.SubElement(case, "failure", message=_sentence(metric)).text = explained
        elif metric.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", message="; ".join(metric.reasons) or "the interval does not decide")
    ElementTree.indent(suite)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(suite, encoding="unicode")}\n'


def append_summary(found: Comparison) -> None:
    """Append the Markdown to the job's summary where GitHub Actions runs the process; nothing anywhere else."""
    if path := os.environ.get(_SUMMARY):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(to_markdown(found))


def _lines(found: Comparison) -> Iterator[str]:
    yield f"## {found.verdict.capitalize()}: {found.candidate} beside {found.baseline}"
    yield ""
    yield "| metric | baseline | candidate | worse by (95 % interval) | origin | verdict |"
    yield "|---|---|---|---|---|---|"
    yield from (_row(metric) for metric in found.metrics)
    yield ""
    yield f"Allowed: {100 * found.max_regression:.3g} % worse."
    yield from (f"- {metric.metric}: {reason}" for metric in found.metrics for reason in metric.reasons)
    if found.differences:
        yield ""
        yield "### What is otherwise"
        yield ""
        yield from (f"- {'**worse** ' if d.worse else ''}{d.sentence}" for d in found.differences[:_MOST])
        if (rest := len(found.differences) - _MOST) > 0:
            yield f"- and {rest} more: all are in the JSON"
    if found.not_compared:
        yield ""
        yield from (f"- not compared: {name}: {why}" for name, why in found.not_compared.items())


def _row(metric: Metric) -> str:
    figures = " | ".join(figure_of(value, metric.unit) for value in (metric.baseline, metric.candidate))
    change = "" if metric.worse is None else change_of(metric.worse)
    origin = "" if metric.baseline is None else metric.origin
    return f"| {metric.metric} | {figures} | {change} | {origin} | {metric.verdict} |"


def figure_of(value: float | None, unit: str) -> str:
    """A figure of a metric with its unit."""
    if value is None:
        return "unknown"
    if unit == "bytes":
        return f"{value:,.0f} bytes"
    return f"{value:.4g} {unit}" if unit in ("ms", "queries/s", "kernels") else f"{100 * value:.2f} %"


def change_of(found: Interval) -> str:
    """A change in percent, with its interval where it has one."""
    if found.low == found.high:
        return f"{100 * found.value:+.2f} %"
    return f"{100 * found.value:+.2f} % [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def _sentence(metric: Metric) -> str:
    figures = f"{figure_of(metric.baseline, metric.unit)} → {figure_of(metric.candidate, metric.unit)}"
    return "; ".join([figures, *metric.reasons])
