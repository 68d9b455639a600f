"""List what bench has measured, and plot it over time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from deploy.text_table import text_table
from deploy.timing.history import Array, History, open_history
from deploy.timing.results import BenchResult, EngineResult
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
COLUMNS = ("run", "model", "batch", "quantity", "number", "value")
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


class Series(NamedTuple):
    """The samples of one quantity of one engine, [samples], in the order in which they were taken."""

    run: str
    model: str
    batch: int
    quantity: str
    values: Array


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
    """Write every sample of the results shown: run, model, batch, quantity, number, value.

    Args:
        shown: the results.
        history: the SQLite file that holds them.
        path: a Parquet file if it ends with .parquet, else a CSV file.

    Raises:
        GpusqError: the history cannot be used, or Parquet is asked for without pyarrow.
    """
    with open_history(history) as open_one:
        write = _write_parquet if path.suffix == ".parquet" else _write_csv
        write(path, _series(shown, open_one))


def _series(shown: ShownHistory, history: History) -> Iterator[Series]:
    for result in shown.results:
        for position, engine in enumerate(result.engines):
            for quantity in (*QUANTITIES, *(("enqueue_ms",) if engine.enqueue else ())):
                values = history.samples(result.id, position, quantity)
                yield Series(result.id, engine.name, result.batch, quantity, values)


def _write_csv(path: Path, series: Iterable[Series]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for one in series:
            head = (one.run, one.model, one.batch, one.quantity)
            writer.writerows([*head, number, repr(value)] for number, value in enumerate(one.values.tolist()))


def _write_parquet(path: Path, series: Iterable[Series]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise GpusqError(
            "writing Parquet needs pyarrow", hint="pip install 'gpusq[parquet]', or write a .csv"
        ) from None
    text, whole = pyarrow.string(), pyarrow.int64()
    types = (text, text, whole, text, whole, pyarrow.float64())
    schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for one in series:
            count = len(one.values)
            head = [[value] * count for value in (one.run, one.model, one.batch, one.quantity)]
            writer.write_table(pyarrow.table([*head, range(count), one.values], schema=schema))


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
