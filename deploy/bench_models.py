"""Time models side by side on this host's CPU, and keep every sample: what `gpusq bench` does.

    warm up each engine until its window's median is stable
    pilot     the first engine beside itself, two sessions    → the noise floor of this host
    pairs     every engine once a pair, in random order       → latency, compute; one request at a time
    windows   every engine without a pause, on all streams    → throughput; back to back

A model is called faster or slower than the baseline if the interval of the ratio lies beyond the noise floor.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import numpy as np

from deploy.environment import host, processor, versions
from deploy.manifest import Interval
from deploy.onnxruntime_api import cores
from deploy.progress import Progress
from deploy.timing import conditions
from deploy.timing import statistics as stats
from deploy.timing.conditions import Conditions
from deploy.timing.device_lock import device_lock
from deploy.timing.engine import CpuEngine, Model, open_engine, read_model, runtime, warm_up
from deploy.timing.history import Raw, open_history
from deploy.timing.interleave import Array, Budget, Samples, interleave, windows_of_throughput
from deploy.timing.results import BenchResult, BenchResults, EngineResult, Figures, Speedup
from profiles.errors import GpusqError

DEVICE = "cpu"
_WINDOWS = 10
_PILOT = 4  # the pilot and the throughput get a quarter of the time that the pairs have
Verdict = Literal["faster", "slower", "inconclusive"]


@dataclass(frozen=True)
class BenchSpec:
    """How to measure.

    Attributes:
        batches: the batch sizes, each measured alone.
        streams: threads that call without a pause for the throughput.
        budget: how long the pairs are taken.
        seed: of the inputs, the order and the bootstrap.
        resampling: how intervals are made.
        wait: whether to wait for another bench on the same device.
    """

    batches: tuple[int, ...] = (1,)
    streams: int = 1
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    resampling: stats.Resampling = field(default_factory=stats.Resampling)
    wait: bool = True


def bench_models(
    models: Sequence[Path],
    baseline: Path | None = None,
    spec: BenchSpec | None = None,
    *,
    history: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> BenchResults:
    """Time `models`, beside `baseline` if there is one.

    Args:
        models: bundles or ONNX files.
        baseline: a bundle or an ONNX file that each of them is compared with.
        spec: how to measure.
        history: the file that the results and their samples are stored in; None stores none.
        progress: is told what goes on.
        say: takes one sentence for the user.

    Raises:
        GpusqError: a model cannot be read or run, or the history cannot be used.
    """
    spec, progress = spec or BenchSpec(), progress or Progress()
    contenders = [read_model(path) for path in ([*models] if baseline is None else [baseline, *models])]
    if history is not None:  # what cannot be stored is found before an hour of measuring
        with open_history(history, create=True):
            pass
    results = []
    with device_lock(DEVICE, wait=spec.wait, say=say):
        for batch in spec.batches:
            result, raw = measure(contenders, baseline is not None, batch, spec, progress)
            results.append(result)
            if history is not None:
                with open_history(history, create=True) as db:
                    db.add(result, raw)
    return BenchResults(results=tuple(results))


def measure(
    models: Sequence[Model], has_baseline: bool, batch: int, spec: BenchSpec, progress: Progress
) -> tuple[BenchResult, Raw]:
    """Time `models` at one batch, the first of them the baseline if there is one; the device is the caller's to lock.

    Returns:
        The result, and the samples of each model by quantity.

    Raises:
        GpusqError: a model cannot be run at this batch.
    """
    random = np.random.default_rng(spec.seed)
    engines = [open_engine(model, batch, spec.seed) for model in models]
    with progress.working(f"batch {batch}: warming up"):
        calls = [warm_up(engine) for engine in engines]
    before = conditions.read()
    with progress.working(f"batch {batch}: pilot, {models[0].name} beside itself"):
        floor = noise_floor(engines[0], batch, spec, random) if has_baseline else 0.0
    with progress.working(f"batch {batch}: one request at a time") as advance:
        samples = interleave(engines, spec.budget, random, advance)
    with progress.working(f"batch {batch}: back to back"):
        streams = [[engine, *(engine.beside() for _ in range(spec.streams - 1))] for engine in engines]
        rates = windows_of_throughput(streams, spec.budget.seconds / _PILOT, _WINDOWS, random)
    found = conditions.between(before, conditions.read())
    result = _result(models, has_baseline, batch, spec, calls, floor, samples, rates, found)
    return result, raw_samples(samples, rates)


def raw_samples(samples: Samples, rates: Array) -> Raw:
    """The samples of each engine by quantity, as the history keeps them."""
    rows = zip(samples.compute_ms, samples.latency_ms, rates, strict=True)
    return [{"compute_ms": compute, "latency_ms": latency, "throughput_qps": rate} for compute, latency, rate in rows]


def noise_floor(engine: CpuEngine, batch: int, spec: BenchSpec, random: np.random.Generator) -> float:
    """The largest share by which an engine differs from itself in another session: the far end of the interval.

    Two sessions of one model lie elsewhere in memory, and may so differ for as long as they live.
    """
    twin = open_engine(engine.model, batch, spec.seed)
    warm_up(twin)
    budget = Budget(spec.budget.seconds / _PILOT, spec.budget.min_pairs // 2, spec.budget.max_pairs)
    latency = interleave([engine, twin], budget, random).latency_ms
    found = stats.log_ratio(latency[0], latency[1], spec.resampling)
    return math.expm1(max(abs(found.low), abs(found.high)))


def verdict_of(log_ratio: Interval, floor: float) -> Verdict:
    """What the interval of log(baseline / candidate) allows to say, where equals may differ by the share `floor`."""
    limit = math.log1p(floor)
    if log_ratio.low > limit:
        return "faster"
    return "slower" if log_ratio.high < -limit else "inconclusive"


def _result(
    models: Sequence[Model],
    has_baseline: bool,
    batch: int,
    spec: BenchSpec,
    calls: Sequence[int],
    floor: float,
    samples: Samples,
    rates: Array,
    found: Conditions,
) -> BenchResult:
    engines = []
    for index, model in enumerate(models):
        latency, rate = samples.latency_ms[index], stats.interval(rates[index], stats.median, spec.resampling)
        compared = has_baseline and index > 0
        engines.append(
            EngineResult(
                name=model.name,
                precision=model.precision,
                sha256=model.sha256,
                warm_up_calls=calls[index],
                latency=_figures(latency, spec.resampling),
                compute=_figures(samples.compute_ms[index], spec.resampling),
                throughput_qps=rate,
                samples_per_s=rate.value * batch,
                speedup=_speedup(models[0], samples, rates, index, floor, spec, found) if compared else None,
            )
        )
    return BenchResult(
        id=uuid.uuid4().hex,
        created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        gpusq=versions().get("gpusq", "unknown"),
        device=processor(),
        runtime=runtime(),
        threads=cores(),
        host=host(),
        batch=batch,
        streams=spec.streams,
        pairs=samples.latency_ms.shape[1],
        noise_floor=floor,
        conditions=found,
        engines=tuple(engines),
    )


def _figures(samples: Array, how: stats.Resampling) -> Figures:
    return Figures(
        p50_ms=stats.interval(samples, stats.median, how),
        p99_ms=stats.interval(samples, stats.p99, how),
        mean_ms=float(samples.mean()),
        min_ms=float(samples.min()),
        max_ms=float(samples.max()),
    )


def _speedup(
    baseline: Model, samples: Samples, rates: Array, index: int, floor: float, spec: BenchSpec, found: Conditions
) -> Speedup:
    latency = stats.log_ratio(samples.latency_ms[0], samples.latency_ms[index], spec.resampling)
    limit = math.copysign(math.log1p(floor), latency.value)
    verdict = "inconclusive" if found.broken else verdict_of(latency, floor)
    helps = verdict == "inconclusive" and not found.broken and abs(latency.value) > abs(limit)
    return Speedup(
        baseline=baseline.name,
        baseline_precision=baseline.precision,
        latency=stats.exponential(latency),
        throughput=stats.exponential(stats.log_ratio(rates[index], rates[0], spec.resampling)),
        verdict=verdict,
        more_pairs=stats.pairs_to_decide(latency, limit, samples.latency_ms.shape[1]) if helps else None,
    )


def parse_batches(text: str) -> tuple[int, ...]:
    """The batch sizes that `1,8,32` names.

    Raises:
        GpusqError: one of them is no number from 1 on.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise GpusqError(f"{text!r} names no batch sizes", hint="write --batch 1,8,32")
    return tuple(dict.fromkeys(int(word) for word in words))
