"""Run engines side by side: each pair calls every engine once, in random order, so that all see the same machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.progress import Advance
from deploy.timing.engine import Timed, Times

Array = npt.NDArray[np.float64]
_NS_PER_MS = 1e6
_NS_PER_S = 1e9
_TELL_S = 0.1
_DRAWN = 1000


@dataclass(frozen=True)
class Budget:
    """How long to measure: until `seconds` are over and `min_pairs` taken, and never more than `max_pairs`."""

    seconds: float = 4.0
    min_pairs: int = 200
    max_pairs: int = 5000


@dataclass(frozen=True)
class Samples:
    """What interleaved calls took, in milliseconds, each [engines, pairs]."""

    compute_ms: Array
    latency_ms: Array
    enqueue_ms: Array


def interleave(
    engines: Sequence[Timed], budget: Budget, random: np.random.Generator, progress: Advance = lambda share: None
) -> Samples:
    """Call `engines` one request at a time, pair by pair, the order within each drawn anew."""
    pairs: list[list[Times]] = []
    start = told = time.perf_counter()
    for order in _orders(len(engines), budget.max_pairs, random):
        now = time.perf_counter()
        spent = (now - start) / budget.seconds
        if spent >= 1 and len(pairs) >= budget.min_pairs:
            break
        pair: list[Times] = [(0, 0, 0)] * len(engines)
        for index in order:
            pair[index] = engines[index].call()
        pairs.append(pair)
        if now - told > _TELL_S:
            progress(min(1.0, max(spent, len(pairs) / budget.max_pairs)))
            told = now
    found = np.asarray(pairs, np.float64).transpose(2, 1, 0) / _NS_PER_MS
    return Samples(compute_ms=found[0], latency_ms=found[1], enqueue_ms=found[2])


def _orders(engines: int, pairs: int, random: np.random.Generator) -> Iterator[list[int]]:
    """An order for each pair; drawn many at a time, so that nothing is drawn between two calls but now and then."""
    for start in range(0, pairs, _DRAWN):
        drawn = np.tile(np.arange(engines), (min(_DRAWN, pairs - start), 1))
        yield from random.permuted(drawn, axis=1).tolist()


def back_to_back(streams: Sequence[Timed], seconds: float) -> float:
    """Queries per second when each of `streams`, a thread of its own, calls without a pause for `seconds`.

    As trtexec: the queries divided by the wall time from the first start to the last end.
    """
    counts, stop = [0] * len(streams), threading.Event()
    start = time.perf_counter_ns()
    threads = [threading.Thread(target=_repeat, args=(own, stop, counts, i)) for i, own in enumerate(streams)]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return sum(counts) * _NS_PER_S / (time.perf_counter_ns() - start)


def _repeat(engine: Timed, stop: threading.Event, counts: list[int], index: int) -> None:
    while not stop.is_set() or not counts[index]:
        engine.call()
        counts[index] += 1


def windows_of_throughput(
    engines: Sequence[Sequence[Timed]], seconds: float, windows: int, random: np.random.Generator
) -> Array:
    """Queries per second of each engine in `windows` windows, interleaved as the calls are: [engines, windows].

    Args:
        engines: of each engine, its streams.
        seconds: for all windows of all engines together.
        windows: how many each engine gets.
        random: the source of the order.
    """
    each = seconds / (windows * len(engines))
    found = np.zeros((len(engines), windows))
    for window in range(windows):
        for index in random.permutation(len(engines)):
            found[index, window] = back_to_back(engines[index], each)
    return found
