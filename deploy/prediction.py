"""What `gpusq predict` prints: points, kernels and modules, all of them predicted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from deploy.text_table import text_table
from profiles.record import Record

SCHEMA = 1
_SHOWN = 8
_NAME = 48


class Ratio(Record):
    """Latency of the baseline / latency of the model, with its 80 % interval."""

    value: float
    low: float
    high: float
    baseline_ms: float


class Point(Record):
    """The latency of the model on one device at one batch; the interval covers 80 %."""

    profile: str
    device: str
    power_mode: str | None
    batch: int
    latency_ms: float
    low_ms: float
    high_ms: float
    throughput_per_s: float
    bound_by: str = Field(description="launch, bandwidth, tensor core, sparse tensor core or CUDA cores.")
    kernels: int
    sparse_kernels: int = Field(description="For how many a 2:4 kernel is the faster.")
    unmodelled_share: float = Field(description="Share of the time in kernels whose bytes alone were counted.")
    speedup: Ratio | None = Field(default=None, description="None where there is no baseline.")
    int8: Ratio | None = Field(default=None, description="What INT8 products bring beside float16 ones, all dense.")
    sparse: Ratio | None = Field(default=None, description="What 2:4 weights in every layer bring beside dense ones.")


class KernelPoint(Record):
    """One kernel of one point."""

    profile: str
    batch: int
    name: str
    kind: str
    number: str = Field(description="The type that it multiplies, or moves.")
    modules: tuple[str, ...]
    latency_ms: float
    share: float
    bound_by: str
    modelled: bool


class Predicted(Record):
    """The prediction of a model."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    origin: Literal["predicted"] = "predicted"
    model: str
    baseline: str | None
    precision: str | None
    source: str = Field(description="Where the kernels come from.")
    points: tuple[Point, ...]
    kernels: tuple[KernelPoint, ...]

    def to_text(self) -> str:
        """The prediction for the terminal: the points, then what holds the first of them back."""
        first = self.points[0]
        return "\n".join(
            [
                f"{self.model}: predicted, not measured; kernels: by {self.source}",
                "",
                text_table([_HEADING, *(_row(point) for point in self.points)]),
                "",
                f"slowest on {first.profile} at batch {first.batch}:",
                text_table([("module", "ms", "share", "bound by"), *self._slowest(first)]),
                "",
                text_table([_QUESTIONS, *map(self._answers, self.points)]),
                *_remarks(self),
            ]
        )

    def _answers(self, point: Point) -> tuple[str, ...]:
        """Is INT8 worth it here, will 2:4 help at this batch, and which layer holds the model back."""
        modules = self.modules(point.profile, point.batch)
        slowest = max(modules, key=lambda name: modules[name])
        share = modules[slowest] / point.latency_ms
        held = f"{slowest}, {100 * share:.0f} % of the time"
        return (point.profile, str(point.batch), _verdict(point.int8), _verdict(point.sparse), held)

    def modules(self, profile: str, batch: int) -> dict[str, float]:
        """Milliseconds of each module at one point; a kernel of several counts for the first."""
        found: dict[str, float] = {}
        for kernel in self.kernels:
            if (kernel.profile, kernel.batch) == (profile, batch):
                module = kernel.modules[0] if kernel.modules else kernel.name[:_NAME]
                found[module] = found.get(module, 0.0) + kernel.latency_ms
        return found

    def _slowest(self, point: Point) -> Iterator[tuple[str, ...]]:
        modules = self.modules(point.profile, point.batch)
        bound = {
            (kernel.modules[0] if kernel.modules else kernel.name[:_NAME]): kernel.bound_by
            for kernel in sorted(self.kernels, key=lambda each: each.latency_ms)
            if (kernel.profile, kernel.batch) == (point.profile, point.batch)
        }
        for module in sorted(modules, key=lambda name: -modules[name])[:_SHOWN]:
            share = modules[module] / point.latency_ms
            yield module, f"{modules[module]:.4f}", f"{100 * share:.1f} %", bound[module]


_HEADING = ("profile", "batch", "latency ms", "80 % interval", "per s", "speed-up", "bound by", "2:4 kernels")


_QUESTIONS = ("profile", "batch", "INT8 worth it?", "2:4 in all layers?", "held back by")
_WORTH = 1.05


def _verdict(ratio: Ratio | None) -> str:
    if ratio is None:
        return "no such kernels"
    word = "no" if ratio.value < _WORTH else "yes" if ratio.low > 1 else "perhaps"
    return f"{word}, {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _row(point: Point) -> tuple[str, ...]:
    mode = f" {point.power_mode}" if point.power_mode else ""
    ratio = point.speedup
    return (
        point.profile + mode,
        str(point.batch),
        f"{point.latency_ms:.3f}",
        f"{point.low_ms:.3f} to {point.high_ms:.3f}",
        f"{point.throughput_per_s:,.0f}",
        "" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        point.bound_by,
        f"{point.sparse_kernels} of {point.kernels}",
    )


def _remarks(predicted: Predicted) -> Iterator[str]:
    unknown = max(point.unmodelled_share for point in predicted.points)
    if unknown:
        yield ""
        yield f"not modelled: up to {100 * unknown:.1f} % of the time is in kernels whose bytes alone were counted"
