"""The timings of two models in a history: of runs that timed both, pair by pair, else of runs of each on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploy.comparison.subject import Subject
from deploy.timing.history import History, open_history
from deploy.timing.results import BenchResult
from deploy.timing.statistics import Resampling, median, p99, resampled, stretched

Array = npt.NDArray[np.float64]
_QUANTITIES = ("latency_ms", "throughput_qps")


@dataclass(frozen=True)
class Timings:
    """Samples of both models.

    Attributes:
        paired: whether sample i of both was taken in one pair.
        baseline: by quantity, `latency_ms` or `throughput_qps`, [samples].
        candidate: the same.
        device: where they were taken.
        batch: of how many samples a request was.
        runs: how many runs they come from.
    """

    paired: bool
    baseline: dict[str, Array]
    candidate: dict[str, Array]
    device: str
    batch: int
    runs: int

    def worse(self, metric: str, how: Resampling) -> tuple[float, Array]:
        """By how much the candidate is worse: log ratio, positive where it is; and of each resample, [resamples].

        p50 and throughput of pairs are the median of the pairs' ratios; all else is the ratio of the statistics.
        """
        quantity = "throughput_qps" if metric == "throughput" else "latency_ms"
        sign = -1.0 if metric == "throughput" else 1.0
        of = p99 if metric == "p99" else median
        before, after = self.baseline[quantity], self.candidate[quantity]
        if self.paired and metric != "p99":
            logs = np.log(after / before)
            value, spread = float(median(logs)), resampled([logs], median, how)
        elif self.paired:
            ratio = _log_ratio_of(of)
            value, spread = float(ratio(after, before)), resampled([after, before], ratio, how)
        else:
            value = float(np.log(of(after) / of(before)))
            other = Resampling(how.resamples, how.confidence, how.seed + 1)
            spread = np.log(resampled([after], of, how) / resampled([before], of, other))
        return sign * value, sign * stretched(value, spread, min(len(before), len(after)), how)


def _log_ratio_of(statistic: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda above, below: np.log(statistic(above) / statistic(below))


def find_timings(baseline: Subject, candidate: Subject, db: Path, last: int) -> Timings | str:
    """Return the timings of both, from the `last` usable runs; or why there are none.

    Raises:
        GpusqError: a history cannot be used.
    """
    files = [baseline.history or db, candidate.history or db]
    if not all(file.is_file() for file in files):
        return f"no history in {next(file for file in files if not file.is_file())}: run gpusq bench"
    with open_history(files[0]) as before, open_history(files[1]) as after:
        if files[0] == files[1] and (paired := _paired(before, baseline, candidate, last)) is not None:
            return paired
        return _unpaired(before, after, baseline, candidate, last)


def _paired(history: History, baseline: Subject, candidate: Subject, last: int) -> Timings | None:
    """Of the runs that timed both."""
    found = []
    for result in history.results(usable=True):
        first, second = _position(result, baseline), _position(result, candidate, after=_position(result, baseline))
        if first is not None and second is not None and first != second:
            found.append((result, first, second))
    if not found:
        return None
    runs = [run for run in found if _key(run[0]) == _key(found[-1][0])][-last:]
    return Timings(
        paired=True,
        baseline=_joined(history, [(result, first) for result, first, _ in runs]),
        candidate=_joined(history, [(result, second) for result, _, second in runs]),
        device=runs[-1][0].device,
        batch=runs[-1][0].batch,
        runs=len(runs),
    )


def _unpaired(before: History, after: History, baseline: Subject, candidate: Subject, last: int) -> Timings | str:
    old, new = list(_runs(before, baseline)), list(_runs(after, candidate))
    for name, runs in ((baseline.name, old), (candidate.name, new)):
        if not runs:
            return f"the history holds no usable result of {name}: run gpusq bench on a quiet machine"
    key = next((_key(result) for result, _ in reversed(new) if _key(result) in {_key(r) for r, _ in old}), None)
    if key is None:
        return "the two were never measured on the same device with the same batch, runtime and streams"
    old, new = ([run for run in runs if _key(run[0]) == key][-last:] for runs in (old, new))
    return Timings(
        paired=False,
        baseline=_joined(before, old),
        candidate=_joined(after, new),
        device=new[-1][0].device,
        batch=new[-1][0].batch,
        runs=len(old) + len(new),
    )


def _runs(history: History, subject: Subject) -> Iterator[tuple[BenchResult, int]]:
    for result in history.results(usable=True):
        if (position := _position(result, subject)) is not None:
            yield result, position


def _position(result: BenchResult, subject: Subject, after: int | None = None) -> int | None:
    """Where the subject stands in a run; that behind `after` where there is one: a model may be timed beside itself.

    A history that names no model means the last of a run: the candidate of the last bench.
    """
    places = [
        index
        for index, engine in enumerate(result.engines)
        if not subject.models or engine.sha256 in subject.models or engine.name in subject.models
    ]
    if not subject.models:
        return places[-1]
    behind = [place for place in places if place != after]
    return next(iter(behind or places), None)


def _key(result: BenchResult) -> tuple[str, str, int, int, int]:
    return result.device, result.runtime, result.threads, result.batch, result.streams


def _joined(history: History, runs: Sequence[tuple[BenchResult, int]]) -> dict[str, Array]:
    return {
        quantity: np.concatenate([history.samples(result.id, position, quantity) for result, position in runs])
        for quantity in _QUANTITIES
    }
