"""A report as data: what the page and the Markdown both say, in one order.

A section is a list of blocks; each kind of block has one macro in `report.html.j2` and one in `report.md.j2`. Every
figure stands under an origin: measured, verified, computed, compiled, predicted or published, or it is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from markupsafe import Markup

from deploy.manifest import Missing
from deploy.report.tables import Table

Origin = Literal["verified", "measured", "compiled", "computed", "predicted", "published", "not here"]
State = Literal["good", "bad", "open", "absent"]

ORIGINS: dict[Origin, str] = {
    "verified": "compared with the student on the same samples, on the host named below",
    "measured": "timed, on the device that is named beside the figure",
    "compiled": "read from the compiler, not timed",
    "computed": "counted in the model's tensors",
    "predicted": "from a model of the device, not measured; drawn as outlines",
    "published": "said by the source that is named beside it, not found here",
    "not here": "this host could not do it, or was not asked to",
}


@dataclass(frozen=True)
class Card:
    """One verdict: a headline, the lines beneath it, the section that has the details."""

    title: str
    headline: str
    lines: tuple[str, ...]
    origin: Origin
    state: State
    section: str


@dataclass(frozen=True)
class Line:
    """What became of one gate or claim."""

    what: str
    verdict: str
    state: State
    origin: Origin
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lines:
    """Gates and claims, one a line."""

    kind: ClassVar[str] = "lines"
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    kind: ClassVar[str] = "words"
    text: str
    tone: Literal["plain", "note", "absence", "formula"] = "plain"


@dataclass(frozen=True)
class Tables:
    """Tables; several stand beside each other where there is room."""

    kind: ClassVar[str] = "tables"
    tables: tuple[Table, ...]
    shape: Literal["", "pair", "wide"] = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, under its origin; its text alternative is what the Markdown says."""

    kind: ClassVar[str] = "figure"
    id: str
    drawing: Markup
    alternative: str
    origin: Origin
    caption: str = ""
    key: tuple[tuple[str, str], ...] = ()
    colours: tuple[tuple[str, str], ...] = field(default=())


@dataclass(frozen=True)
class Steps:
    """What is missing, each with the way to it."""

    kind: ClassVar[str] = "steps"
    items: tuple[Missing, ...]


@dataclass(frozen=True)
class Sentences:
    """A list; what is `worse` is marked."""

    kind: ClassVar[str] = "sentences"
    items: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Folded:
    """A table that is long: folded on the page, left out of the Markdown."""

    kind: ClassVar[str] = "folded"
    summary: str
    table: Table


Block = Lines | Words | Tables | Figure | Steps | Sentences | Folded


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    id: str
    title: str
    blocks: tuple[Block, ...]
    origin: Origin | None = None


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        subject: what it is about.
        target: the device, or what the subject is compared with; empty where there is none.
        facts: what stands below the title.
        cards: the verdicts in large.
        lines: the gates and claims.
        sections: the rest, in order.
        gpusq: the release that wrote it.
        source: what it was written from.
        joint: what stands between subject and target.
    """

    subject: str
    target: str
    facts: tuple[tuple[str, str], ...]
    cards: tuple[Card, ...]
    lines: tuple[Line, ...]
    sections: tuple[Section, ...]
    gpusq: str
    source: str
    joint: str = "→"
