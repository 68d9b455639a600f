"""Throughput over the batch: measured on one device, or predicted for one, never both in one figure."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.prediction import Point
from deploy.report import formats
from deploy.report.document import Figure
from deploy.report.drawing.chart import Mark, Series, batch_axis, chart, linear_axis
from deploy.report.timings import Newest


def measured(found: Sequence[Newest]) -> Figure:
    """Samples per second of each engine at each batch, with 95 % intervals, of the newest runs."""
    names = dict.fromkeys(engine.name for one in found for engine in one.result.engines)
    series = [_series(name, found) for name in names]
    first = found[0].result
    return _figure("throughput", series, f"measured on {first.device}, {first.runtime}", "measured")


def predicted(points: Sequence[Point]) -> Figure:
    """Samples per second at each batch, with 80 % intervals, of one device."""
    marks = tuple(
        Mark(
            point.batch,
            point.throughput_per_s,
            1e3 * point.batch / point.high_ms,
            1e3 * point.batch / point.low_ms,
            hollow=True,
            says=f"batch {point.batch}: predicted {formats.significant(point.throughput_per_s)} samples per second",
        )
        for point in points
    )
    series = [Series(points[0].device, tuple((mark.x, mark.y) for mark in marks), marks)]
    return _figure("predicted-throughput", series, f"predicted for {points[0].device}", "predicted")


def _series(name: str, found: Sequence[Newest]) -> Series:
    marks = tuple(
        Mark(
            one.result.batch,
            engine.samples_per_s,
            engine.throughput_qps.low * one.result.batch,
            engine.throughput_qps.high * one.result.batch,
            hollow=not one.result.usable,
            says=f"{name}, batch {one.result.batch}: {formats.significant(engine.samples_per_s)} samples per second",
        )
        for one in found
        for engine in one.result.engines
        if engine.name == name
    )
    return Series(name, tuple((mark.x, mark.y) for mark in marks), marks)


def _figure(name: str, series: Sequence[Series], where: str, origin: str) -> Figure:
    marks = [mark for one in series for mark in one.marks]
    x = batch_axis([round(mark.x) for mark in marks])
    y = linear_axis("samples per second", 0, 1.05 * max(mark.high or mark.y for mark in marks))
    figures = "; ".join(
        f"{one.name} {', '.join(f'{formats.significant(mark.y)} at batch {mark.x:g}' for mark in one.marks)}"
        for one in series
    )
    alternative = f"Samples per second, {where}: {figures}."
    hollow = origin == "measured" and any(mark.hollow for mark in marks)
    caption = "Back to back, with 95 % intervals." if origin == "measured" else "With 80 % intervals."
    caption += " An outline is a run that broke a condition." if hollow else ""
    return Figure(name, chart(x, y, series, alternative), alternative, origin, caption)  # type: ignore[arg-type]
