"""A plan as a picture: a row is a block, a tile a kernel, its width what the kernel takes, its colour its numbers.

All rows have one scale. A tile is reached by the pointer and by the keyboard, and says what it is; the page's script
shows that beside it. An attention that is one kernel has a frame of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from deploy.report.drawing.svg import element, frame, percent, text

LABEL_WIDTH = 112
_ROW, _THICK = 32, 27
_MOST_LETTERS = 15
_LINE = 24  # tiles side by side, before a block takes another line
_WIDE, _MEDIUM = 0.09, 0.028  # shares of the width that a word, and a letter, needs


@dataclass(frozen=True)
class Tile:
    """One kernel.

    Attributes:
        row: the block that it belongs to.
        weight: how wide it is; None where that is not known.
        colour: the class of its numbers.
        mixed: whether its inputs are of several types.
        letter: its kind, short.
        word: its kind.
        fused: whether it is a whole attention.
        says: what it is, in words.
    """

    row: str
    weight: float | None
    colour: str
    mixed: bool
    letter: str
    word: str
    fused: bool
    says: str


@dataclass(frozen=True)
class _Row:
    name: str
    tiles: tuple[Tile, ...]
    first: bool


def tiles(found: Sequence[Tile], alternative: str) -> Markup:
    """Return the picture; where no weight is known all tiles are of one width, and long blocks take several rows."""
    known = [tile.weight for tile in found if tile.weight is not None]
    usual = min(known) if known else 1.0
    found = found if known else [replace(tile, weight=usual) for tile in found]
    rows = _rows(found)
    longest = max(sum(_weight(tile, usual) for tile in row.tiles) for row in rows)
    drawn = [part for number, row in enumerate(rows) for part in _draw(row, number, usual, longest)]
    labels = [_label(row, number) for number, row in enumerate(rows)]
    height = _ROW * len(rows)
    return frame(labels, drawn, label_width=LABEL_WIDTH, height=height, alternative=alternative, role="group")


def _weight(tile: Tile, usual: float) -> float:
    return usual if tile.weight is None else tile.weight


def _rows(found: Sequence[Tile]) -> list[_Row]:
    """The blocks in the order of their first kernels, the lines of a long one below each other."""
    lines: list[_Row] = []
    for name in dict.fromkeys(tile.row for tile in found):
        own = [tile for tile in found if tile.row == name]
        for start in range(0, len(own), _LINE):
            whole = name if start == 0 else f"{name} · {start // _LINE + 1}"
            lines.append(_Row(whole, tuple(own[start : start + _LINE]), first=not lines))
    return lines


def _draw(row: _Row, number: int, usual: float, longest: float) -> list[Markup]:
    parts, left = [], 0.0
    for index, tile in enumerate(row.tiles):
        share = _weight(tile, usual) / longest
        parts.append(_tile(tile, left, share, _ROW * number, reached=row.first and index == 0))
        left += share
    return parts


def _tile(tile: Tile, left: float, share: float, top: int, *, reached: bool) -> Markup:
    kind = " ".join(
        ["tile", tile.colour, *(["mixed"] if tile.mixed else []), *(["unknown"] if tile.weight is None else [])]
    )
    parts = [element("rect", x=percent(left), y=top, width=percent(share), height=_THICK, class_=kind)]
    if tile.fused:
        parts.append(element("rect", x=percent(left), y=top, width=percent(share), height=_THICK, class_="fused"))
    if share >= _MEDIUM:
        parts += _words(tile, percent(left + share / 2), top + 18, wide=share >= _WIDE)
    return element("g", *parts, role="img", aria_label=tile.says, tabindex=0 if reached else -1, data_tip="")


def _words(tile: Tile, place: str, base: int, *, wide: bool) -> list[Markup]:
    """The kind: a word, of which a narrow screen shows the letter, or a letter, of which it shows nothing."""
    ink = f"ink{' mixed' if tile.mixed else ''}{' pale' if tile.weight is None else ''}"
    letter = text(tile.letter, place, base, anchor="middle", class_=f"{ink} {'narrow' if wide else 'roomy'}")
    return [text(tile.word, place, base, anchor="middle", class_=f"{ink} roomy"), letter] if wide else [letter]


def _label(row: _Row, number: int) -> Markup:
    name = row.name if len(row.name) <= _MOST_LETTERS else f"…{row.name[1 - _MOST_LETTERS :]}"
    whole = element("title", row.name) if name != row.name else Markup("")
    return element("g", whole, text(name, LABEL_WIDTH - 10, _ROW * number + 18, anchor="end"))
