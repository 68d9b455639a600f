"""A history as a hundred bundles leave it: one real run, told again with other hashes, days and latencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploy.bench_models import BenchSpec, bench_models
from deploy.bundle import hash_file
from deploy.manifest import Interval
from deploy.timing.history import open_history
from deploy.timing.interleave import Budget
from deploy.timing.results import BenchResult
from deploy.timing.statistics import Resampling

SPEC = BenchSpec(batches=(1, 8), budget=Budget(0.02, 20, 40), resampling=Resampling(resamples=50))


def long_history(path: Path, model: Path, runs: int) -> Path:
    """Write `runs` runs of `model` and its forerunners at two batches to `path`; the last are of the model itself."""
    random = np.random.default_rng(0)
    real = bench_models([model], model, SPEC).results
    with open_history(path, create=True) as history:
        for number in range(runs):
            for result in real:
                samples = [{"latency_ms": random.lognormal(0, 0.1, 300)} for _ in result.engines]
                sha256 = hash_file(model).sha256 if number == runs - 1 else f"{number:064x}"
                history.add(_told_again(result, number, sha256, 1 + 0.1 * float(random.random())), samples)
    return path


def _told_again(result: BenchResult, number: int, sha256: str, factor: float) -> BenchResult:
    engines = tuple(
        engine.model_copy(
            update={
                "sha256": sha256,
                "latency": engine.latency.model_copy(update={"p50_ms": _scaled(engine.latency.p50_ms, factor)}),
            }
        )
        for engine in result.engines
    )
    day = f"2026-{1 + number // 28:02}-{1 + number % 28:02}T10:00:00.000+00:00"
    conditions = result.conditions.model_copy(update={"broken": ("a planted load",) if number % 10 == 3 else ()})
    changes = {"id": f"{number}-{result.batch}", "created": day, "engines": engines, "conditions": conditions}
    return result.model_copy(update=changes)


def _scaled(found: Interval, factor: float) -> Interval:
    return Interval(value=found.value * factor, low=found.low * factor, high=found.high * factor)
