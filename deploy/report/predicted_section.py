"""The section on what is predicted, for a device that need not be here: nothing in it is measured."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.prediction import Point, Predicted
from deploy.report import formats, plan_picture, throughput
from deploy.report.document import Block, Card, Section, Tables, Words
from deploy.report.tables import Column, Table

_SHOWN = 8


def predicted_section(found: Predicted | str) -> Section:
    """Latency and throughput at each batch, and where the time of the first goes; or why nothing is predicted."""
    title = "What is predicted"
    if isinstance(found, str):
        return Section("predicted", title, (Words(f"Nothing was predicted: {found}.", "absence"),))
    blocks: list[Block] = [
        Words(
            f"Predicted by the cost model, not measured; the kernels are those of {found.source}. The latency is the "
            "sum of the kernels, without the host and without copies to and from the device.",
            "note",
        )
    ]
    for points in _by_device(found):
        blocks += [Tables((_points(points, found),)), throughput.predicted(points)]
    first = found.points[0]
    blocks += [plan_picture.predicted(found, first), Tables((_slowest(found, first),))]
    return Section("predicted", title, tuple(blocks), "predicted")


def predicted_card(found: Predicted) -> Card:
    """The latency of the first point, in place of one that was not measured."""
    first = found.points[0]
    lines = (
        f"80 % interval {formats.significant(first.low_ms)} to {formats.milliseconds(first.high_ms)}",
        f"batch {first.batch}; bound by {first.bound_by}",
        "not measured: needs the device",
    )
    return Card("Speed", f"{formats.milliseconds(first.latency_ms)} predicted", lines, "predicted", "open", "predicted")


def _by_device(found: Predicted) -> list[list[Point]]:
    profiles = dict.fromkeys((point.profile, point.power_mode) for point in found.points)
    return [[point for point in found.points if (point.profile, point.power_mode) == key] for key in profiles]


def _points(points: Sequence[Point], found: Predicted) -> Table:
    columns = [
        Column("batch", "number"),
        Column("latency [80 %]", "number"),
        Column("samples/s", "number"),
        Column("bound by"),
        Column("2:4 kernels", "number"),
        Column("not modelled", "number"),
    ]
    if found.baseline is not None:
        columns.append(Column(f"× {found.baseline} [80 %]", "number"))
    mode = f" in {points[0].power_mode}" if points[0].power_mode else ""
    rows = tuple(_point(point) for point in points)
    return Table(f"Predicted for {points[0].device}{mode}, not measured", tuple(columns), rows)


def _point(point: Point) -> tuple[str, ...]:
    ratio = point.speedup
    return (
        str(point.batch),
        f"{formats.milliseconds(point.latency_ms)} "
        f"[{formats.significant(point.low_ms)}, {formats.significant(point.high_ms)}]",
        formats.significant(point.throughput_per_s),
        point.bound_by,
        f"{point.sparse_kernels} of {point.kernels}",
        formats.percent(point.unmodelled_share),
        *(
            []
            if ratio is None
            else [f"{formats.times(ratio.value)} [{formats.significant(ratio.low)}, {formats.significant(ratio.high)}]"]
        ),
    )


def _slowest(found: Predicted, point: Point) -> Table:
    modules = found.modules(point.profile, point.batch)
    rows = tuple(
        (name, f"{formats.significant(1e3 * modules[name])} µs", formats.percent(modules[name] / point.latency_ms))
        for name in sorted(modules, key=lambda name: -modules[name])[:_SHOWN]
    )
    columns = (Column("module", "code"), Column("predicted", "number"), Column("of the time", "number"))
    return Table(f"Slowest modules at batch {point.batch}, predicted", columns, rows)
