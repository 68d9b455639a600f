"""What one measurement took, and the result that it comes to."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from deploy.environment import gpus, host, processor, versions
from deploy.manifest import Interval
from deploy.onnxruntime_api import cores
from deploy.timing import statistics as stats
from deploy.timing.conditions import Conditions
from deploy.timing.engine import Model
from deploy.timing.gpu_conditions import GpuConditions
from deploy.timing.history import Raw
from deploy.timing.interleave import Array, Samples
from deploy.timing.results import BenchResult, EngineResult, Figures, LayerTime, Speedup

CPU = "cpu"
Verdict = Literal["faster", "slower", "inconclusive"]


@dataclass(frozen=True)
class Taken:
    """What engines that were timed side by side gave, in their order.

    Attributes:
        calls: of the warm-up.
        noise_floor: the largest difference that equal engines may show here, as a share; 0 without a baseline.
        samples: of the pairs.
        rates: queries per second of each window, [engines, windows].
        joules: a query takes; None where it is not told.
        layers: the time of each kernel of each; empty where not asked for.
        cuda_graphs: whether launches were graphs, in words.
        conditions: of the host.
        gpu: of the GPU; None on a CPU.
    """

    calls: Sequence[int]
    noise_floor: float
    samples: Samples
    rates: Array
    joules: Sequence[float | None]
    layers: Sequence[tuple[LayerTime, ...]]
    cuda_graphs: Sequence[str]
    conditions: Conditions
    gpu: GpuConditions | None

    def raw(self) -> Raw:
        """The samples of each engine by quantity, as the history keeps them."""
        found: list[dict[str, Array]] = []
        for index, rates in enumerate(self.rates):
            times = {"compute_ms": self.samples.compute_ms, "latency_ms": self.samples.latency_ms}
            if self.gpu is not None:
                times["enqueue_ms"] = self.samples.enqueue_ms
            found.append({**{name: rows[index] for name, rows in times.items()}, "throughput_qps": rates})
        return found

    def all_conditions(self) -> Conditions:
        """Those of the device; of a GPU's host they are notes."""
        if self.gpu is None:
            return self.conditions
        notes = (*self.conditions.notes, *self.conditions.broken, *self.gpu.notes())
        return self.conditions.model_copy(update={"notes": notes, "broken": tuple(self.gpu.broken())})


def result_of(
    models: Sequence[Model], has_baseline: bool, batch: int, streams: int, taken: Taken, how: stats.Resampling
) -> BenchResult:
    """The result of one measurement.

    Args:
        models: that were timed, the first of them the baseline if there is one.
        has_baseline: whether it is.
        batch: of every input.
        streams: that called for the throughput.
        taken: what it took.
        how: intervals are made.
    """
    conditions = taken.all_conditions()
    engines = [_engine(model, index, batch, taken, how) for index, model in enumerate(models)]
    if has_baseline:
        compared = [_speedup(models[0], taken, index, how, conditions) for index in range(1, len(models))]
        engines[1:] = [
            engine.model_copy(update={"speedup": speedup})
            for engine, speedup in zip(engines[1:], compared, strict=True)
        ]
    return BenchResult(
        id=uuid.uuid4().hex,
        created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        gpusq=versions().get("gpusq", "unknown"),
        device=processor() if taken.gpu is None else gpus()[0].name,
        runtime=models[0].runtime,
        threads=cores(),
        host=host(),
        batch=batch,
        streams=streams,
        pairs=taken.samples.latency_ms.shape[1],
        noise_floor=taken.noise_floor,
        conditions=conditions,
        gpu=taken.gpu,
        engines=tuple(engines),
    )


def _engine(model: Model, index: int, batch: int, taken: Taken, how: stats.Resampling) -> EngineResult:
    rate = stats.interval(taken.rates[index], stats.median, how)
    samples = taken.samples
    return EngineResult(
        name=model.name,
        precision=model.precision,
        sha256=model.sha256,
        warm_up_calls=taken.calls[index],
        latency=_figures(samples.latency_ms[index], how),
        compute=_figures(samples.compute_ms[index], how),
        enqueue=None if taken.gpu is None else _figures(samples.enqueue_ms[index], how),
        throughput_qps=rate,
        samples_per_s=rate.value * batch,
        cuda_graph=taken.cuda_graphs[index],
        energy_j=taken.joules[index],
        layers=taken.layers[index],
        speedup=None,
    )


def _figures(samples: Array, how: stats.Resampling) -> Figures:
    return Figures(
        p50_ms=stats.interval(samples, stats.median, how),
        p99_ms=stats.interval(samples, stats.p99, how),
        mean_ms=float(samples.mean()),
        min_ms=float(samples.min()),
        max_ms=float(samples.max()),
    )


def _speedup(baseline: Model, taken: Taken, index: int, how: stats.Resampling, conditions: Conditions) -> Speedup:
    samples, rates = taken.samples.latency_ms, taken.rates
    latency = stats.log_ratio(samples[0], samples[index], how)
    limit = math.copysign(math.log1p(taken.noise_floor), latency.value)
    verdict = "inconclusive" if conditions.broken else verdict_of(latency, taken.noise_floor)
    helps = verdict == "inconclusive" and not conditions.broken and abs(latency.value) > abs(limit)
    return Speedup(
        baseline=baseline.name,
        baseline_precision=baseline.precision,
        latency=stats.exponential(latency),
        throughput=stats.exponential(stats.log_ratio(rates[index], rates[0], how)),
        verdict=verdict,
        more_pairs=stats.pairs_to_decide(latency, limit, samples.shape[1]) if helps else None,
    )


def verdict_of(log_ratio: Interval, floor: float) -> Verdict:
    """What the interval of log(baseline / candidate) allows to say, where equals may differ by the share `floor`."""
    limit = math.log1p(floor)
    if log_ratio.low > limit:
        return "faster"
    return "slower" if log_ratio.high < -limit else "inconclusive"
