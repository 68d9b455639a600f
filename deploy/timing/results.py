"""What `gpusq bench` found, as it is printed, stored in the history, and read by compare and claims."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from deploy.manifest import Interval
from deploy.text_table import text_table
from deploy.timing.conditions import Conditions
from deploy.timing.gpu_conditions import GpuConditions
from profiles.record import Record

SCHEMA = 1
_SHOWN = 15
_LAYER_HEADING = ("module", "kernels", "time", "share")
_HEADING = ("model", "batch", "latency p50", "p99", "compute p50", "queries/s", "than the baseline")


class Figures(Record):
    """Percentiles of one quantity in milliseconds, by trtexec's rule, with 95 % bootstrap intervals."""

    p50_ms: Interval
    p99_ms: Interval
    mean_ms: float
    min_ms: float
    max_ms: float


class Speedup(Record):
    """How many times as fast as the baseline."""

    baseline: str
    baseline_precision: str
    latency: Interval = Field(description="Median over pairs of baseline / candidate latency, one request at a time.")
    throughput: Interval = Field(description="Median over windows of candidate / baseline throughput, back to back.")
    verdict: Literal["faster", "slower", "inconclusive"]
    more_pairs: int | None = Field(description="Pairs that would still decide, if the ratio stays; None where none do.")


class LayerTime(Record):
    """One kernel of an engine."""

    name: str
    modules: tuple[str, ...] = Field(description="The modules whose operators it computes, where they are known.")
    ms: float = Field(description="The median of calls that were profiled, apart from those that were timed.")
    share: float = Field(description="Of the sum over all kernels.")


class EngineResult(Record):
    """One engine at one batch size."""

    name: str
    precision: str
    sha256: str = Field(description="Of the ONNX file that was run.")
    warm_up_calls: int
    latency: Figures = Field(description="Inputs bound to outputs fetched, one request at a time.")
    compute: Figures = Field(description="The run alone.")
    enqueue: Figures | None = Field(default=None, description="None where the call itself computes, as on a CPU.")
    throughput_qps: Interval = Field(description="Queries (batches) per second, back to back on all streams.")
    samples_per_s: float = Field(description="Throughput times the batch.")
    cuda_graph: str = Field(default="not used: the runtime has none")
    energy_j: float | None = Field(default=None, description="Joules of the device a query; None where not told.")
    layers: tuple[LayerTime, ...] = Field(default=(), description="The slowest first; empty where not asked for.")
    speedup: Speedup | None


class BenchResult(Record):
    """Engines that were timed side by side, at one batch size."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    origin: Literal["measured"] = "measured"
    id: str
    created: str
    gpusq: str
    device: str
    runtime: str
    threads: int
    host: dict[str, str]
    batch: int
    streams: int
    pairs: int
    noise_floor: float = Field(description="The largest difference that equal engines may show here, as a share.")
    conditions: Conditions
    gpu: GpuConditions | None = Field(default=None, description="None on a CPU.")
    engines: tuple[EngineResult, ...]

    @property
    def usable(self) -> bool:
        """Whether no condition was broken."""
        return not self.conditions.broken

    def to_text(self) -> str:
        """The result for the terminal."""
        return "\n".join(
            [
                f"{self.device}, {self.runtime}, {self.threads} threads, {self.streams} streams, {self.pairs} pairs, "
                f"noise floor {100 * self.noise_floor:.1f} %",
                "",
                text_table([_HEADING, *(_row(engine, self.batch) for engine in self.engines)]),
                *self._marks(),
                *(line for engine in self.engines for line in _layers(engine)),
            ]
        )

    def _marks(self) -> Iterator[str]:
        yield from (f"Not used for verdicts: {reason}" for reason in self.conditions.broken)
        yield from (f"Note: {note}" for note in self.conditions.notes)
        for engine in self.engines if self.usable else ():
            if engine.speedup is not None and engine.speedup.verdict == "inconclusive":
                yield f"{engine.name}: {_undecided(engine.speedup.more_pairs)}"


class BenchResults(Record):
    """One call of bench: a result for each batch size."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    results: tuple[BenchResult, ...]

    def to_text(self) -> str:
        """The results for the terminal."""
        return "\n\n".join(result.to_text() for result in self.results)


def _layers(engine: EngineResult) -> Iterator[str]:
    """The slowest modules, and what the others come to."""
    if not engine.layers:
        return
    modules = defaultdict[str, list[LayerTime]](list)
    for layer in engine.layers:
        modules[", ".join(layer.modules) or layer.name].append(layer)
    ranked = sorted(modules.items(), key=lambda item: -sum(layer.ms for layer in item[1]))
    rows = [_module_row(name, layers) for name, layers in ranked[:_SHOWN]]
    if rest := ranked[_SHOWN:]:
        rows.append(_module_row(f"{len(rest)} others", [layer for _, layers in rest for layer in layers]))
    yield from ("", f"{engine.name}, profiled apart:", text_table([_LAYER_HEADING, *rows]))


def _module_row(name: str, layers: Sequence[LayerTime]) -> tuple[str, ...]:
    ms, share = sum(layer.ms for layer in layers), sum(layer.share for layer in layers)
    return (name, str(len(layers)), f"{ms:.4g} ms", f"{share:.1%}")


def _undecided(more: int | None) -> str:
    if more is None:
        return "inconclusive; no number of pairs decides between figures that are this alike"
    return f"inconclusive; about {more} more pairs would decide, if the ratio stays"


def _row(engine: EngineResult, batch: int) -> tuple[str, ...]:
    return (
        f"{engine.name} ({engine.precision})",
        str(batch),
        _ms(engine.latency.p50_ms),
        _ms(engine.latency.p99_ms),
        _ms(engine.compute.p50_ms),
        f"{engine.throughput_qps.value:.4g}",
        "" if engine.speedup is None else _speedup(engine.speedup),
    )


def _ms(found: Interval) -> str:
    return f"{found.value:.4g} ms [{found.low:.4g}, {found.high:.4g}]"


def _speedup(found: Speedup) -> str:
    ratio = found.latency
    return f"{found.verdict}: {ratio.value:.3f}× [{ratio.low:.3f}, {ratio.high:.3f}]"
