"""List what bench has measured, and plot it over time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from deploy.text_table import text_table
from deploy.timing.history import open_history
from deploy.timing.results import BenchResult, EngineResult
from profiles.record import Record

SCHEMA = 1
_HEADING = ("measured at (UTC)", "model", "batch", "latency p50", "p99", "queries/s", "than the baseline", "mark")
QUANTITIES = ("latency_ms", "compute_ms", "throughput_qps")
_SHORT = 19  # of an ISO time: down to the second


class ShownHistory(Record):
    """Results, the oldest first."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    results: tuple[BenchResult, ...]

    def to_text(self) -> str:
        """One line for each engine of each result."""
        return text_table([_HEADING, *(_row(result, e) for result in self.results for e in result.engines)])


def show_history(path: Path, model: str | None = None, last: int | None = None) -> ShownHistory:
    """Read the results in the history at `path`.

    Args:
        path: the SQLite file.
        model: only those that hold this model, by name or SHA-256.
        last: only so many of the newest.

    Raises:
        GpusqError: there is no history, or it cannot be used.
    """
    with open_history(path) as history:
        return ShownHistory(results=tuple(history.results(model=model, last=last)))


def write_samples(shown: ShownHistory, history: Path, path: Path) -> None:
    """Write every sample of the results shown to a CSV file: run, model, batch, quantity, number, value.

    Raises:
        GpusqError: the history cannot be used.
    """
    with open_history(history) as open_one, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "model", "batch", "quantity", "number", "value"])
        for result in shown.results:
            for position, engine in enumerate(result.engines):
                for quantity in QUANTITIES:
                    samples = open_one.samples(result.id, position, quantity)
                    head = (result.id, engine.name, result.batch, quantity)
                    writer.writerows([*head, number, repr(value)] for number, value in enumerate(samples.tolist()))


def write_plot(shown: ShownHistory, path: Path) -> None:
    """Write the p50 latencies with their intervals over time as SVG."""
    import vl_convert

    path.write_text(vl_convert.vegalite_to_svg(json.dumps(_chart(shown))), encoding="utf-8")


def _chart(shown: ShownHistory) -> dict[str, Any]:
    points = [
        {
            "time": result.created,
            "model": f"{engine.name}, batch {result.batch}",
            "p50": engine.latency.p50_ms.value,
            "low": engine.latency.p50_ms.low,
            "high": engine.latency.p50_ms.high,
            "used": "yes" if result.usable else "no, a condition was broken",
        }
        for result in shown.results
        for engine in result.engines
    ]
    time = {"field": "time", "type": "temporal", "title": "measured at"}
    color = {"field": "model", "type": "nominal", "title": "model"}
    return {
        "data": {"values": points},
        "width": 640,
        "height": 320,
        "layer": [
            {
                "mark": "rule",
                "encoding": {
                    "x": time,
                    "y": {"field": "low", "type": "quantitative", "title": "latency p50, ms"},
                    "y2": {"field": "high"},
                    "color": color,
                },
            },
            {
                "mark": {"type": "point", "filled": True},
                "encoding": {
                    "x": time,
                    "y": {"field": "p50", "type": "quantitative"},
                    "color": color,
                    "shape": {"field": "used", "type": "nominal", "title": "used for verdicts"},
                },
            },
        ],
    }


def _row(result: BenchResult, engine: EngineResult) -> tuple[str, ...]:
    speedup = "" if engine.speedup is None else f"{engine.speedup.verdict} {engine.speedup.latency.value:.3f}×"
    return (
        result.created[:_SHORT],
        engine.name,
        str(result.batch),
        f"{engine.latency.p50_ms.value:.4g} ms",
        f"{engine.latency.p99_ms.value:.4g} ms",
        f"{engine.throughput_qps.value:.4g}",
        speedup,
        "; ".join(result.conditions.broken),
    )
