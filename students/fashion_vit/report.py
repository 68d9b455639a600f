"""The table of several seeds' accuracies, from the cards of their student files."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

Cards = tuple[dict[str, Any], ...]
HEADER = "| seed | dense % | 2:4 % | 2:4+INT8 % | 2:4+INT8 − dense | minutes |\n|---|---|---|---|---|---|"


def table(runs: Sequence[Cards]) -> str:
    """Markdown: a row per run of its (dense, 2:4, 2:4+INT8) cards' test accuracies, then mean ± standard deviation."""
    rows = [figures(cards) for cards in runs]
    lines = [HEADER]
    for cards, row in zip(runs, rows, strict=True):
        lines.append(f"| {cards[0]['seed']} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    lines.append("| mean ± s | " + " | ".join(spread(column) for column in zip(*rows, strict=True)) + " |")
    return "\n".join(lines)


def figures(cards: Cards) -> list[float]:
    """Three test accuracies in %, the last one's distance to the first in points, and the run's minutes."""
    accuracies = [100 * card["test_accuracy"] for card in cards]
    return [*accuracies, accuracies[-1] - accuracies[0], cards[0]["seconds"] / 60]


def spread(values: Sequence[float]) -> str:
    """`mean ± s`, s being the sample standard deviation; the mean alone for one value."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{mean(values):.2f}"
