"""Horizontal bars with their figures: sizes, and how many layers are left at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from deploy.report.drawing.svg import element, frame, percent, text

LABEL_WIDTH = 128
_ROW, _THICK = 30, 20
_LONGEST = 0.74  # of the area: the figure stands behind the bar


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: what it is of.
        value: how long it is.
        figure: the value as text.
        series: the colour, by number.
        hollow: whether it is an outline: predicted, or not known.
    """

    name: str
    value: float
    figure: str
    series: int = 0
    hollow: bool = False


def bars(rows: Sequence[Bar], alternative: str) -> Markup:
    """Return the drawing; the longest bar takes about three quarters of the width."""
    most = max((row.value for row in rows), default=0) or 1
    labels = [text(row.name, LABEL_WIDTH - 8, _ROW * i + 19, anchor="end") for i, row in enumerate(rows)]
    area = [part for i, row in enumerate(rows) for part in _bar(row, _ROW * i, _LONGEST * row.value / most)]
    return frame(labels, area, label_width=LABEL_WIDTH, height=_ROW * len(rows), alternative=alternative)


def _bar(row: Bar, top: int, share: float) -> tuple[Markup, Markup]:
    style = f"bar series-{row.series} {'hollow' if row.hollow else 'full'}"
    drawn = element("rect", x="0", y=top + 5, width=percent(share), height=_THICK, rx=2, class_=style)
    behind = element("svg", text(row.figure, 8, 19, class_="strong"), x=percent(share), y=top, overflow="visible")
    return drawn, behind
