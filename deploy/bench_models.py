"""Time models side by side on this host, its CPU or its GPU, and keep every sample: what `gpusq bench` does.

    warm up each engine until its window's median is stable
    pilot     the first engine beside itself, two sessions    → the noise floor of this host
    pairs     every engine once a pair, in random order       → latency, compute; one request at a time
    windows   every engine without a pause, on all streams    → throughput; back to back
    energy    every engine without a pause, where power can be read

A model is called faster or slower than the baseline if the interval of the ratio lies beyond the noise floor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deploy.environment import gpus
from deploy.progress import Progress
from deploy.timing import conditions
from deploy.timing import statistics as stats
from deploy.timing.device_lock import device_lock
from deploy.timing.energy import joules_per_call
from deploy.timing.engine import Model, Opened, open_engine, read_model, warm_up
from deploy.timing.gpu_conditions import conditions_of, watching
from deploy.timing.gpu_engine import open_gpu_engine
from deploy.timing.history import Raw, open_history
from deploy.timing.interleave import Array, Budget, interleave, windows_of_throughput
from deploy.timing.layer_times import layer_times
from deploy.timing.results import BenchResult, BenchResults
from deploy.timing.taken import CPU, Taken, result_of
from profiles.errors import GpusqError

LEAST_FLOOR = 0.01
_WINDOWS = 10
_PILOT = 4  # the pilot and the throughput get a quarter of the time that the pairs have


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
        layers: whether to time each kernel as well, in calls of their own.
    """

    batches: tuple[int, ...] = (1,)
    streams: int = 1
    budget: Budget = field(default_factory=Budget)
    seed: int = 0
    resampling: stats.Resampling = field(default_factory=stats.Resampling)
    wait: bool = True
    layers: bool = False


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
    with device_lock(device_of(contenders), wait=spec.wait, say=say):
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
    on_gpu = models[0].bundle is not None
    random = np.random.default_rng(spec.seed)
    with contextlib.ExitStack() as open_ones:
        engines = [open_ones.enter_context(contextlib.closing(opened(model, batch, spec.seed))) for model in models]
        with progress.working(f"batch {batch}: warming up"):
            calls = [warm_up(engine) for engine in engines]
        before = conditions.read()
        with watching(on_gpu) as readings:
            with progress.working(f"batch {batch}: pilot, {models[0].name} beside itself"):
                floor = noise_floor(engines[0], batch, spec, random) if has_baseline else 0.0
            with progress.working(f"batch {batch}: one request at a time") as advance:
                samples = interleave(engines, spec.budget, random, advance)
            with progress.working(f"batch {batch}: back to back"):
                rates = _throughput(engines, spec, random)
        taken = Taken(
            calls=calls,
            noise_floor=floor,
            samples=samples,
            rates=rates,
            joules=[joules_per_call(engine, spec.budget.seconds / _PILOT, on_gpu=on_gpu) for engine in engines],
            layers=[layer_times(engine) if spec.layers else () for engine in engines],
            cuda_graphs=[engine.cuda_graph for engine in engines],
            conditions=conditions.between(before, conditions.read()),
            gpu=conditions_of(readings) if on_gpu else None,
        )
    return result_of(models, has_baseline, batch, spec.streams, taken, spec.resampling), taken.raw()


def device_of(models: Sequence[Model]) -> str:
    """The device that all of `models` run on.

    Raises:
        GpusqError: some run on the GPU and some on the CPU.
    """
    kinds = {model.bundle is not None for model in models}
    if len(kinds) > 1:
        raise GpusqError("some of these run on the GPU and some on the CPU", hint="bench them apart")
    return gpus()[0].name if kinds == {True} else CPU


def opened(model: Model, batch: int, seed: int) -> Opened:
    """The engine of `model` where it belongs, ready to be called."""
    return open_engine(model, batch, seed) if model.bundle is None else open_gpu_engine(model, batch, seed)


def _throughput(engines: Sequence[Opened], spec: BenchSpec, random: np.random.Generator) -> Array:
    with contextlib.ExitStack() as open_ones:
        streams: list[list[Opened]] = []
        for engine in engines:
            others = (engine.beside() for _ in range(spec.streams - 1))
            streams.append([engine, *(open_ones.enter_context(contextlib.closing(other)) for other in others)])
        return windows_of_throughput(streams, spec.budget.seconds / _PILOT, _WINDOWS, random)


def noise_floor(engine: Opened, batch: int, spec: BenchSpec, random: np.random.Generator) -> float:
    """The largest share by which an engine differs from itself in another session: the far end of the interval.

    Two sessions of one model lie elsewhere in memory, and may so differ for as long as they live. One twin is not all
    of them: of many, on a quiet machine, the farthest was 0.7 % off, so the floor is never below 1 %.
    """
    with contextlib.closing(opened(engine.model, batch, spec.seed)) as twin:
        warm_up(twin)
        budget = Budget(spec.budget.seconds / _PILOT, spec.budget.min_pairs // 2, spec.budget.max_pairs)
        latency = interleave([engine, twin], budget, random).latency_ms
    found = stats.log_ratio(latency[0], latency[1], spec.resampling)
    return max(LEAST_FLOOR, math.expm1(max(abs(found.low), abs(found.high))))


def parse_batches(text: str) -> tuple[int, ...]:
    """The batch sizes that `1,8,32` names.

    Raises:
        GpusqError: one of them is no number from 1 on.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise GpusqError(f"{text!r} names no batch sizes", hint="write --batch 1,8,32")
    return tuple(dict.fromkeys(int(word) for word in words))
