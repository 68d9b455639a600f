"""Latency distributions: the share of runs that took at most so many milliseconds, from the raw samples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from deploy.report import formats
from deploy.report.document import Figure
from deploy.report.drawing.chart import Mark, Series, chart, linear_axis
from deploy.timing.statistics import percentile

MAX_STEPS = 400
_BEYOND = 1.2  # of the largest p99: what is slower is counted, not drawn


def distribution(name: str, samples: Mapping[str, Sequence[float]], device: str) -> Figure:
    """Return the distributions of some models over each other.

    Args:
        name: of the figure, in the page.
        samples: latencies in ms of each model, [samples].
        device: where they were taken.
    """
    taken = {model: sorted(values) for model, values in samples.items()}
    marks = {model: (_percentile(values, 50), _percentile(values, 99)) for model, values in taken.items()}
    end = min(max(values[-1] for values in taken.values()), _BEYOND * max(p99 for _, p99 in marks.values()))
    x = linear_axis("latency, ms", min(values[0] for values in taken.values()), end)
    y = linear_axis("share of runs", 0, 1, percent_of_one=True)
    series = [_series(model, values, marks[model], end) for model, values in taken.items()]
    words = "; ".join(
        f"{model} p50 {formats.milliseconds(p50)}, p99 {formats.milliseconds(p99)}"
        for model, (p50, p99) in marks.items()
    )
    alternative = f"Share of runs by latency, measured on {device}: {words}."
    if cut := sum(len(values) - bisect_right(values, end) for values in taken.values()):
        alternative += f" Not drawn: {formats.count(cut)} of the samples, slower than {formats.milliseconds(end)}."
    return Figure(name, chart(x, y, series, alternative), alternative, "measured", "The marks are p50 and p99.")


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(percentile(np.asarray(values), percent))


def _series(model: str, values: Sequence[float], marks: tuple[float, float], end: float) -> Series:
    p50, p99 = marks
    return Series(
        model,
        tuple(_steps(values, end)),
        (Mark(p50, 0.5, says=f"{model}: p50 {formats.milliseconds(p50)}"),
         *((Mark(p99, 0.99, says=f"{model}: p99 {formats.milliseconds(p99)}"),) if p99 <= end else ())),
        steps=True,
    )  # fmt: skip


def _steps(values: Sequence[float], end: float) -> list[tuple[float, float]]:
    """At most MAX_STEPS steps of the distribution up to `end`, at evenly spaced ranks, first and last among them."""
    drawn = bisect_right(values, end)
    number = min(drawn, MAX_STEPS)
    ranks = sorted({round(i * (drawn - 1) / max(number - 1, 1)) for i in range(number)})
    return [(values[0], 0.0), *((values[rank], (rank + 1) / len(values)) for rank in ranks)]
