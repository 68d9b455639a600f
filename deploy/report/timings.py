"""What a history tells of a model: its newest run at each batch, and every run on that device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.timing.history import History, open_history
from deploy.timing.results import BenchResult, EngineResult

QUANTITY = "latency_ms"


@dataclass(frozen=True)
class Newest:
    """A run, and the latencies in ms of each of its engines, in the order in which they were taken."""

    result: BenchResult
    samples: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Timings:
    """The runs of a model on one device.

    Attributes:
        models: SHA-256 of its files; empty where all of the history is meant.
        newest: the newest run at each batch, by batch: a usable one where there is one.
        runs: all, the oldest first.
    """

    models: frozenset[str]
    newest: tuple[Newest, ...]
    runs: tuple[BenchResult, ...]

    def is_own(self, engine: EngineResult) -> bool:
        """Whether this is an engine of the model itself, not one of its baseline or its forerunners."""
        return not self.models or engine.sha256 in self.models


def read_timings(db: Path, models: Collection[str] = (), names: Collection[str] = ()) -> Timings | str:
    """Return the runs in a history, or why there are none.

    Args:
        db: the history.
        models: SHA-256 of the model's files; with `names` empty as well, every run counts.
        names: what runs of its forerunners call it.

    Raises:
        GpusqError: the history cannot be used.
    """
    if not db.is_file():
        return f"there is no history in {db}: gpusq bench writes one"
    with open_history(db) as history:
        found = [result for result in history.results() if not (models or names) or _is_of(result, models, names)]
        own = [result for result in found if not models or _is_of(result, models, ())]
        if not own:
            return f"the history in {db} holds no run of it"
        runs = [result for result in found if _key(result) == _key(own[-1])]
        return Timings(frozenset(models), tuple(_newest(history, own)), tuple(runs))


def _is_of(result: BenchResult, models: Collection[str], names: Collection[str]) -> bool:
    return any(engine.sha256 in models or engine.name in names for engine in result.engines)


def _key(result: BenchResult) -> tuple[str, str, int, int]:
    return result.device, result.runtime, result.threads, result.streams


def _newest(history: History, own: list[BenchResult]) -> Iterator[Newest]:
    """Of those on the device of the last."""
    runs = [result for result in own if _key(result) == _key(own[-1])]
    for batch in sorted({result.batch for result in runs}):
        candidates = [result for result in runs if result.batch == batch]
        result = next((one for one in reversed(candidates) if one.usable), candidates[-1])
        samples = {
            _label(result, position): tuple(history.samples(result.id, position, QUANTITY).tolist())
            for position in range(len(result.engines))
        }
        yield Newest(result, samples)


def _label(result: BenchResult, position: int) -> str:
    """The engine's name; of two of one name, with their number."""
    name = result.engines[position].name
    twice = sum(engine.name == name for engine in result.engines) > 1
    return f"{name}, no. {position + 1}" if twice else name
