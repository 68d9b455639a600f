"""Measure the student beside its baseline while a bundle is made: `gpusq bench` at one batch, told for the manifest.

The samples go to `latency.csv` in the bundle, so that the report can draw them without a history.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from deploy.bench_models import BenchSpec, device_of, measure
from deploy.manifest import Measurement, Timing
from deploy.progress import Progress
from deploy.timing.device_lock import device_lock
from deploy.timing.engine import Model
from deploy.timing.interleave import Array
from deploy.timing.results import BenchResult, EngineResult

RAW_FILE = "latency.csv"


def bench(
    student: Model,
    baseline: Model | None = None,
    *,
    batch: int,
    raw: Path,
    spec: BenchSpec | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Time `student`, and `baseline` if there is one, and write every latency to `raw` as CSV.

    Args:
        student: the model that is measured.
        baseline: what it is compared with.
        batch: the length of each input's first axis.
        raw: the file for the samples: pair, model, latency_ms.
        spec: how to measure; its batches are not looked at.
        progress: is told what goes on.
        say: takes one sentence for the user, such as that another bench is waited for.
    """
    spec, progress = spec or BenchSpec(), progress or Progress()
    models = {"student": student} if baseline is None else {"baseline": baseline, "student": student}
    with device_lock(device_of([student]), wait=spec.wait, say=say):
        result, samples = measure(list(models.values()), baseline is not None, batch, spec, progress)
    latencies = {name: found["latency_ms"] for name, found in zip(models, samples, strict=True)}
    _write(raw, latencies)
    return _measurement(dict(zip(models, result.engines, strict=True)), result, raw.name)


def _measurement(engines: dict[str, EngineResult], result: BenchResult, raw: str) -> Measurement:
    speedup = engines["student"].speedup
    verdict: Literal["faster", "slower", "inconclusive", "no baseline"]
    verdict = "no baseline" if speedup is None else speedup.verdict
    return Measurement(
        device=result.device,
        runtime=result.runtime,
        threads=result.threads,
        batch=result.batch,
        pairs=result.pairs,
        student=_timing(engines["student"]),
        baseline=_timing(engines["baseline"]) if "baseline" in engines else None,
        speedup=None if speedup is None else speedup.latency,
        verdict=verdict,
        noise_floor=result.noise_floor if "baseline" in engines else None,
        broken=result.conditions.broken,
        raw=raw,
    )


def _timing(engine: EngineResult) -> Timing:
    return Timing(
        name=engine.name,
        precision=engine.precision,
        p50_ms=engine.latency.p50_ms,
        p99_ms=engine.latency.p99_ms,
        throughput_qps=engine.throughput_qps,
    )


def _write(raw: Path, latencies: dict[str, Array]) -> None:
    with raw.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", "model", "latency_ms"])
        for pair, row in enumerate(zip(*latencies.values(), strict=True)):
            writer.writerows([pair, name, f"{value:.6f}"] for name, value in zip(latencies, row, strict=True))


def summary(found: Measurement) -> str:
    """One line for the terminal."""
    text = f"{found.student.precision} p50 {found.student.p50_ms.value:.3g} ms, p99 {found.student.p99_ms.value:.3g} ms"
    if found.speedup is None or found.baseline is None:
        return text
    s = found.speedup
    ratio = f"{s.value:.2f}× [{s.low:.2f}, {s.high:.2f}]"
    reason = f" ({'; '.join(found.broken)})" if found.broken else ""
    return (
        f"{text}; {found.verdict}{reason} than {found.baseline.name} ({found.baseline.precision}): {ratio}, "
        f"{found.pairs} pairs"
    )
