"""SVG elements as text, every attribute and every text escaped."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

Attribute = str | float | int


def element(tag: str, *children: str, **attributes: Attribute | None) -> Markup:
    """Return an element; `class_` and `stroke_width` become `class` and `stroke-width`, None leaves one out."""
    parts = [f' {_name(key)}="{escape(_text(value))}"' for key, value in attributes.items() if value is not None]
    inner = Markup("").join(children)
    return Markup(f"<{tag}{''.join(parts)}>{inner}</{tag}>")


def text(words: str, x: str | float, y: float, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """A text whose base line is at `y`."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def percent(share: float) -> str:
    """0.25 → `25%`."""
    return f"{100 * share:.4g}%"


def frame(
    labels: Sequence[str], area: Sequence[str], *, label_width: int, height: int, alternative: str, role: str = "img"
) -> Markup:
    """A drawing: `labels`, `label_width` pixels wide, and beside it `area`, as wide as there is room."""
    left = element("svg", *labels, class_="labels", width=label_width, height=height)
    right = element("svg", *area, class_="area", width="100%", height=height)
    return element("div", left, right, class_="drawing", role=role, aria_label=alternative)


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _text(value: Attribute) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
