"""Lines and marks over two axes: distributions, throughput over the batch, latency over time.

A series is told from another by its colour, the shape of its marks and the dashes of its line, so that no one of them
is needed. Lines lie in a picture that is stretched to the width there is, without their stroke growing with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from deploy.report.drawing.svg import element, frame, percent, text

LABEL_WIDTH = 54
MOST_SERIES = 6
_UNITS = 1000  # of the stretched picture's width
_TOP, _BOTTOM = 10, 40
_SHAPES = (
    "M-4,0A4,4 0 1 1 4,0A4,4 0 1 1 -4,0Z",
    "M-4,-4H4V4H-4Z",
    "M0,-5L5,4H-5Z",
    "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "M0,5L5,-4H-5Z",
    "M-1.5,-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
)


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: what it is of, with its unit.
        low: its least value.
        high: its largest, above `low`.
        ticks: values and their labels.
        log: whether equal ratios are equal distances.
    """

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between both ends, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Mark:
    """A point, with the ends of its interval where it has one.

    Attributes:
        x: its place on the horizontal axis.
        y: on the vertical one.
        low: lower end of the interval of y.
        high: upper end.
        hollow: whether it is drawn as an outline: it was not used, or is predicted.
        says: what is said of it.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    says: str = ""


@dataclass(frozen=True)
class Series:
    """A line through `line`, and `marks`.

    Attributes:
        name: what the key says.
        line: places of the line's corners; empty for marks alone.
        marks: the marks.
        steps: whether the line holds its height up to the next corner.
    """

    name: str
    line: tuple[tuple[float, float], ...] = ()
    marks: tuple[Mark, ...] = ()
    steps: bool = False


def linear_axis(title: str, low: float, high: float, *, count: int = 5, percent_of_one: bool = False) -> Axis:
    """An axis with about `count` round ticks between `low` and `high`."""
    if not high > low:
        low, high = (low - 1, low + 1) if low == 0 else (0.9 * low, 1.1 * low)
    values = _round(low, high, count)
    ticks = tuple((value, f"{100 * value:.0f} %" if percent_of_one else f"{value:,g}") for value in values)
    return Axis(title, low, high, ticks)


def batch_axis(batches: Sequence[int]) -> Axis:
    """An axis on which each doubling of the batch is one step, with room at both ends."""
    ticks = tuple((batch, str(batch)) for batch in sorted(set(batches)))
    return Axis("batch", min(batches) / 1.25, max(batches) * 1.25, ticks, log=True)


def chart(x: Axis, y: Axis, series: Sequence[Series], alternative: str, *, height: int = 280) -> Markup:
    """Return the drawing, with a key where there are several series; not more than MOST_SERIES are told apart."""
    inner = height - _TOP - _BOTTOM
    labels = [text(label, LABEL_WIDTH - 8, _down(y, value, inner) + 4, anchor="end") for value, label in y.ticks]
    area = list(_grid(x, y, inner))
    for number, one in enumerate(series):
        area += _draw(number, one, x, y, inner)
    drawn = frame(labels, area, label_width=LABEL_WIDTH, height=height, alternative=alternative)
    return Markup("").join([_head(y.title, series), drawn])


def _round(low: float, high: float, count: int) -> Iterator[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield round(number * step, 12)


def _down(y: Axis, value: float, inner: int) -> float:
    """Pixels from the top; what lies beyond the axis stops at its end."""
    return _TOP + (1 - min(max(y.share(value), 0.0), 1.0)) * inner


def _grid(x: Axis, y: Axis, inner: int) -> Iterator[Markup]:
    for value, _ in y.ticks:
        at = _down(y, value, inner)
        yield element("line", x1="0", x2="100%", y1=at, y2=at, class_="grid")
    for value, label in x.ticks:
        share = x.share(value)
        place = percent(share)
        yield element("line", x1=place, x2=place, y1=_TOP + inner, y2=_TOP + inner + 5, class_="tick")
        anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
        yield text(label, place, _TOP + inner + 18, anchor=anchor)
    yield text(x.title, "100%", _TOP + inner + 35, anchor="end")


def _draw(number: int, one: Series, x: Axis, y: Axis, inner: int) -> Iterator[Markup]:
    kind = f"series-{number % MOST_SERIES}"
    if one.line:
        yield element(
            "svg",
            element("path", d=_path(one, x, y, inner), class_=f"line {kind}"),
            x="0", y="0", width="100%", height=_TOP + inner,
            viewBox=f"0 0 {_UNITS} {_TOP + inner}", preserveAspectRatio="none",
        )  # fmt: skip
    for mark in one.marks:
        yield _mark(mark, number, kind, x, y, inner)


def _path(one: Series, x: Axis, y: Axis, inner: int) -> str:
    places = [(x.share(left) * _UNITS, _down(y, up, inner)) for left, up in one.line]
    (left, top), *rest = places
    drawn = [f"M{left:.1f},{top:.1f}"]
    drawn += [f"H{left:.1f}V{top:.1f}" if one.steps else f"L{left:.1f},{top:.1f}" for left, top in rest]
    return "".join(drawn)


def _mark(mark: Mark, number: int, kind: str, x: Axis, y: Axis, inner: int) -> Markup:
    place = percent(x.share(mark.x))
    parts = []
    if mark.low is not None and mark.high is not None:
        ends = {"y1": _down(y, mark.low, inner), "y2": _down(y, mark.high, inner)}
        parts.append(element("line", x1=place, x2=place, **ends, class_=f"interval {kind}"))
    parts.append(_shape(number, kind, place, _down(y, mark.y, inner), hollow=mark.hollow))
    says = element("title", mark.says) if mark.says else Markup("")
    return element("g", says, *parts, class_="mark")


def _shape(number: int, kind: str, x: str | float, y: float, *, hollow: bool) -> Markup:
    form = element("path", d=_SHAPES[number % MOST_SERIES], class_=f"{kind} {'hollow' if hollow else 'full'}")
    return element("svg", form, x=x, y=y, overflow="visible", width=1, height=1)


def _head(title: str, series: Sequence[Series]) -> Markup:
    """What the vertical axis is of, and the key."""
    keys = [
        element("li", _sample(number, one), element("span", one.name))
        for number, one in enumerate(series)
        if len(series) > 1 or one.marks
    ]
    key = element("ul", *keys, class_="key") if keys else Markup("")
    return element("div", element("span", title, class_="axis"), key, class_="head")


def _sample(number: int, one: Series) -> Markup:
    kind = f"series-{number % MOST_SERIES}"
    parts = [element("path", d="M0,7H26", class_=f"line {kind}")] if one.line else []
    if one.marks:
        parts.append(_shape(number, kind, 13, 7, hollow=all(mark.hollow for mark in one.marks)))
    return element("svg", *parts, width=26, height=14, aria_hidden="true")
