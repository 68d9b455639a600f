"""Markdown that reads well as plain text: aligned tables, and names that cannot become markup."""

from __future__ import annotations

import re

from deploy.report.formats import short_hash
from deploy.report.tables import Column, Table


def aligned(table: Table) -> str:
    """Return the table in GitHub's Markdown, its columns padded to equal width."""
    header = [plain(column.name) for column in table.columns]
    rows = [[_cell(text, column) for text, column in zip(row, table.columns, strict=True)] for row in table.rows]
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]
    rule = [
        "-" * (width - 1) + ":" if column.kind == "number" else "-" * width
        for width, column in zip(widths, table.columns, strict=True)
    ]
    return "\n".join(_line(cells, widths, table.columns) for cells in (header, rule, *rows))


def plain(text: str) -> str:
    """Escape what Markdown would take for markup, and keep the text on one line."""
    escaped = re.sub(r"([\\|<*`])", r"\\\1", " ".join(text.split()))
    return escaped.replace("](", "]\\(")


def indented(text: str) -> str:
    """Return the text as an indented code block, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _cell(text: str, column: Column) -> str:
    if column.kind == "hash":
        text = short_hash(text)
    if column.kind in ("code", "hash") and text:
        return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
    return plain(text)


def _line(cells: list[str], widths: list[int], columns: tuple[Column, ...]) -> str:
    padded = (
        cell.rjust(width) if column.kind == "number" else cell.ljust(width)
        for cell, width, column in zip(cells, widths, columns, strict=True)
    )
    return f"| {' | '.join(padded)} |"
