"""The raw latency samples of a measurement: a CSV with the header `pair,model,latency_ms`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import GpusqError

HEADER = ["pair", "model", "latency_ms"]
_HINT = "the bundle is incomplete or was edited: convert the checkpoint again"


@dataclass(frozen=True)
class Samples:
    """Latencies in milliseconds, in the order in which they were taken."""

    student: tuple[float, ...]
    baseline: tuple[float, ...]


def read_samples(path: Path) -> Samples:
    """Return the samples in the CSV file `path`.

    Raises:
        GpusqError: the file is missing, or a line of it is not a sample.
    """
    if not path.is_file():
        raise GpusqError(f"{path}: no such file, but the manifest names it", hint=_HINT)
    with path.open(encoding="utf-8", newline="") as lines:
        return _parse(csv.reader(lines), path)


def _parse(rows: Iterable[list[str]], path: Path) -> Samples:
    latencies: dict[str, list[float]] = {"student": [], "baseline": []}
    for number, row in enumerate(rows, start=1):
        if number == 1:
            if row != HEADER:
                raise GpusqError(f"{path}: the header is not {','.join(HEADER)}", hint=_HINT)
            continue
        try:
            _pair, model, text = row
            latencies[model].append(_latency(text))
        except (ValueError, KeyError):
            raise GpusqError(f"{path}: line {number} is not a sample: {','.join(row)}", hint=_HINT) from None
    if not latencies["student"]:
        raise GpusqError(f"{path}: there is no sample of the student in it", hint=_HINT)
    return Samples(student=tuple(latencies["student"]), baseline=tuple(latencies["baseline"]))


def _latency(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise ValueError(text)
    return value
