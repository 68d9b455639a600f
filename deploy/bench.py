"""Measure the student beside its baseline on onnxruntime's CPU provider: interleaved, paired, with intervals.

Each pair runs both models once, in random order, on the same random input, one request at a time. What is timed is the
whole call, input to output. Warm-up goes on until the median of the last runs stops falling. Percentiles and intervals
are those of `deploy.timing.statistics`. `gpusq bench` measures more, and keeps a history: `deploy.bench_models`.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from calibration.feed import fit
from deploy.environment import processor
from deploy.manifest import Interval, Measurement, Timing
from deploy.onnxruntime_api import cores, open_session, runtime_version
from deploy.progress import Advance
from deploy.timing import statistics as stats

RAW_FILE = "latency.csv"
Array = npt.NDArray[np.float64]
Feed = Mapping[str, npt.NDArray[np.generic]]
_MILLISECONDS = 1e3


@dataclass(frozen=True)
class Contender:
    """A model to be timed."""

    name: str
    precision: str
    model: Path


@dataclass(frozen=True)
class BenchOptions:
    """How long to measure, and how."""

    seconds: float = 8.0
    min_pairs: int = 200
    max_pairs: int = 5000
    resamples: int = 2000
    seed: int = 0

    @property
    def resampling(self) -> stats.Resampling:
        """How intervals are made."""
        return stats.Resampling(resamples=self.resamples, seed=self.seed)


def bench(
    student: Contender,
    baseline: Contender | None,
    feed: Feed,
    raw: Path,
    options: BenchOptions | None = None,
    *,
    progress: Advance = lambda share: None,
) -> Measurement:
    """Time `student`, and `baseline` if there is one, and write every sample to `raw` as CSV.

    Args:
        student: the model that is measured.
        baseline: what it is compared with.
        feed: one batch of each input, [batch, …].
        raw: the file for the samples: pair, model, latency_ms.
        options: how long and how.
        progress: is told the share that is done.
    """
    options = options or BenchOptions()
    random = np.random.default_rng(options.seed)
    contenders = [student] if baseline is None else [student, baseline]
    sessions = [open_session(contender.model) for contender in contenders]
    feeds = [fit(session.get_inputs(), feed) for session in sessions]
    for session, own in zip(sessions, feeds, strict=True):
        _warm_up(session, own)
    samples = _interleave(sessions, feeds, options, random, progress)
    _write(raw, samples, ["student", "baseline"][: len(contenders)])
    return _measurement(contenders, samples, raw.name, len(next(iter(feed.values()))), options)


def compare(student: Array, baseline: Array, options: BenchOptions) -> Interval:
    """How many times as fast the student is: the median of the pairs' ratios, with its 95 % interval.

    Args:
        student: latencies in ms, [pairs].
        baseline: latencies in ms of the same pairs, [pairs].
        options: the resamples and their seed.
    """
    return stats.exponential(stats.log_ratio(baseline, student, options.resampling))


def verdict_of(speedup: Interval | None) -> Literal["faster", "slower", "inconclusive", "no baseline"]:
    """What the interval allows to say: nothing while it holds 1."""
    if speedup is None:
        return "no baseline"
    if speedup.low > 1:
        return "faster"
    return "slower" if speedup.high < 1 else "inconclusive"


def _warm_up(session: Any, feed: Feed, *, window: int = 20, limit: int = 25) -> None:
    """Run windows of calls until a window's median is no longer below the best one by more than 2 %."""
    best = float("inf")
    for _ in range(limit):
        median = float(np.median([_time(session, feed) for _ in range(window)]))
        if median > 0.98 * best:
            return
        best = median


def _time(session: Any, feed: Feed) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return (time.perf_counter() - start) * _MILLISECONDS


def _interleave(
    sessions: list[Any],
    feeds: Sequence[Feed],
    options: BenchOptions,
    random: np.random.Generator,
    progress: Advance,
) -> Array:
    """Latencies in ms, [models, pairs]."""
    pairs: list[list[float]] = []
    start = time.perf_counter()
    while len(pairs) < options.max_pairs:
        spent = (time.perf_counter() - start) / options.seconds
        if spent >= 1 and len(pairs) >= options.min_pairs:
            break
        pair = [0.0] * len(sessions)
        for index in random.permutation(len(sessions)):
            pair[index] = _time(sessions[index], feeds[index])
        pairs.append(pair)
        progress(min(1.0, max(spent, len(pairs) / options.max_pairs)))
    return np.asarray(pairs).T


def _measurement(
    contenders: list[Contender], samples: Array, raw: str, batch: int, options: BenchOptions
) -> Measurement:
    timings = [_timing(contender, row, options) for contender, row in zip(contenders, samples, strict=True)]
    speedup = compare(samples[0], samples[1], options) if len(contenders) > 1 else None
    return Measurement(
        device=processor(),
        runtime=f"onnxruntime {runtime_version()}, CPU",
        threads=cores(),
        batch=batch,
        pairs=samples.shape[1],
        student=timings[0],
        baseline=timings[1] if len(timings) > 1 else None,
        speedup=speedup,
        verdict=verdict_of(speedup),
        raw=raw,
    )


def _timing(contender: Contender, samples: Array, options: BenchOptions) -> Timing:
    return Timing(
        name=contender.name,
        precision=contender.precision,
        p50_ms=stats.interval(samples, stats.median, options.resampling),
        p99_ms=stats.interval(samples, stats.p99, options.resampling),
    )


def _write(raw: Path, samples: Array, names: list[str]) -> None:
    with raw.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", "model", "latency_ms"])
        for pair, row in enumerate(samples.T):
            writer.writerows([pair, name, f"{value:.6f}"] for name, value in zip(names, row, strict=True))


def summary(found: Measurement) -> str:
    """One line for the terminal."""
    text = f"{found.student.precision} p50 {found.student.p50_ms.value:.3g} ms, p99 {found.student.p99_ms.value:.3g} ms"
    if found.speedup is None or found.baseline is None:
        return text
    s = found.speedup
    ratio = f"{s.value:.2f}× [{s.low:.2f}, {s.high:.2f}]"
    return (
        f"{text}; {found.verdict} than {found.baseline.name} ({found.baseline.precision}): {ratio}, {found.pairs} pairs"
    )
