"""The history as pictures: the p50 of every run at one batch, in the order in which they were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deploy.report import formats
from deploy.report.document import Figure
from deploy.report.drawing.chart import MOST_SERIES, Axis, Mark, Series, chart, linear_axis
from deploy.report.timings import Timings
from deploy.timing.results import BenchResult, EngineResult

_DATE = 10
_TICKS = 5


def trends(found: Timings) -> Iterator[Figure]:
    """Yield for each batch the p50 latencies with their 95 % intervals; outlines are runs that broke a condition."""
    for batch in sorted({result.batch for result in found.runs}):
        yield _trend(found, [result for result in found.runs if result.batch == batch])


def _trend(found: Timings, runs: Sequence[BenchResult]) -> Figure:
    names = list(dict.fromkeys(engine.name for result in runs for engine in _drawn(found, result)))
    series = [_series(name, runs) for name in names[:MOST_SERIES]]
    marks = [mark for one in series for mark in one.marks]
    y = linear_axis("p50, ms", 0, 1.05 * max(mark.high or mark.y for mark in marks))
    alternative = (
        f"p50 of {_count(runs)} at batch {runs[0].batch} on {runs[0].device}, from {runs[0].created[:_DATE]} to "
        f"{runs[-1].created[:_DATE]}: {'; '.join(_span(one) for one in series)}."
    )
    if rest := len(names) - len(series):
        alternative += f" Not drawn: {formats.count(rest)} more models."
    caption = "With 95 % intervals, oldest first. An outline is a run that broke a condition, and is not used."
    drawing = chart(_axis(runs), y, series, alternative, height=240)
    return Figure(f"history-{runs[0].batch}", drawing, alternative, "measured", caption)


def _drawn(found: Timings, result: BenchResult) -> Sequence[EngineResult]:
    """The engines that the report is about: the model and its forerunners, which share a name; else all."""
    names = {engine.name for run in found.runs for engine in run.engines if found.is_own(engine)}
    return [engine for engine in result.engines if engine.name in names]


def _series(name: str, runs: Sequence[BenchResult]) -> Series:
    marks = tuple(
        _mark(number, result, engine)
        for number, result in enumerate(runs)
        for engine in result.engines
        if engine.name == name
    )
    return Series(name, tuple((mark.x, mark.y) for mark in marks if not mark.hollow), marks)


def _mark(number: int, result: BenchResult, engine: EngineResult) -> Mark:
    p50 = engine.latency.p50_ms
    says = f"{engine.name}, {result.created[:16].replace('T', ' ')}: {formats.milliseconds_interval(p50)}"
    broken = "".join(f"; not used: {reason}" for reason in result.conditions.broken)
    return Mark(number, p50.value, p50.low, p50.high, hollow=not result.usable, says=says + broken)


def _axis(runs: Sequence[BenchResult]) -> Axis:
    """The runs at equal distances, some of them with their day."""
    last = len(runs) - 1
    shown = sorted({round(i * last / (_TICKS - 1)) for i in range(_TICKS)})
    ticks = tuple((number, runs[number].created[5:_DATE]) for number in shown)
    return Axis("runs, by month and day", -0.5, last + 0.5, ticks)


def _count(runs: Sequence[BenchResult]) -> str:
    return "1 run" if len(runs) == 1 else f"{formats.count(len(runs))} runs"


def _span(one: Series) -> str:
    first, last = one.marks[0], one.marks[-1]
    return f"{one.name} {formats.milliseconds(first.y)} at first, {formats.milliseconds(last.y)} at last"
