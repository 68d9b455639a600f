"""The sections on what bench has measured: latency, throughput over the batch, and the history."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.report import formats, throughput
from deploy.report.distributions import distribution
from deploy.report.document import Block, Card, Folded, Section, State, Tables, Words
from deploy.report.tables import Column, Table
from deploy.report.timings import Newest, Timings
from deploy.report.trend import trends
from deploy.timing.results import BenchResult, EngineResult


def latency_blocks(found: Timings) -> Iterator[Block]:
    """What the newest runs say: a table, a distribution for each batch, and what was wrong with them."""
    first = found.newest[0].result
    yield Words(
        f"Timed by gpusq bench on {first.device}: {first.runtime}, {_threads(first)}, one request at a time; "
        f"the newest usable run at each batch, made {_days(found)}.",
        "note",
    )
    yield Tables((newest(found),))
    for one in found.newest:
        yield Words(f"Batch {one.result.batch}, {formats.count(one.result.pairs)} pairs:", "note")
        yield distribution(f"latency-{one.result.batch}", one.samples, one.result.device)
        for reason in one.result.conditions.broken:
            yield Words(f"Not used for verdicts, at batch {one.result.batch}: {reason}.")


def throughput_section(found: Timings | str) -> Section:
    """Throughput over the batch, as measured."""
    if isinstance(found, str):
        return Section("throughput", "Throughput over the batch", (Words(f"Not measured: {found}.", "absence"),))
    return Section("throughput", "Throughput over the batch", (throughput.measured(found.newest),), "measured")


def history_section(found: Timings | str) -> Section:
    """The trend at each batch, and every run in a table."""
    if isinstance(found, str):
        return Section("history", "History", (Words(f"Nothing to show: {found}.", "absence"),))
    table = Folded(f"Every run ({formats.count(len(found.runs))})", _runs(found))
    return Section("history", "History", (*trends(found), table), "measured")


def newest(found: Timings) -> Table:
    """The newest run at each batch, every engine of it."""
    columns = (
        Column("model"),
        Column("batch", "number"),
        Column("p50 [95 %]", "number"),
        Column("p99 [95 %]", "number"),
        Column("samples/s", "number"),
        Column("than the baseline"),
        Column("noise floor", "number"),
    )
    rows = tuple(_row(one.result, engine) for one in found.newest for engine in one.result.engines)
    return Table("Latency with 95 % bootstrap intervals", columns, rows)


def speed_card(found: Timings) -> Card:
    """The verdict of the newest run at the smallest batch."""
    one = found.newest[0]
    own = next(engine for engine in reversed(one.result.engines) if found.is_own(engine))
    state: State = "open"
    headline = f"p50 {formats.milliseconds(own.latency.p50_ms.value)}"
    lines = [f"p99 {formats.milliseconds(own.latency.p99_ms.value)}, batch {one.result.batch}"]
    if own.speedup is not None:
        states: dict[str, State] = {"faster": "good", "slower": "bad"}
        state = states.get(own.speedup.verdict, "open")
        lines = [f"against {own.speedup.baseline}, {own.speedup.baseline_precision}", f"{headline}, {lines[0]}"]
        headline = f"{own.speedup.verdict.capitalize()}: {formats.times_interval(own.speedup.latency)}"
    lines += [f"measured on {one.result.device}", *(f"not used: {reason}" for reason in one.result.conditions.broken)]
    return Card("Speed", headline, tuple(lines), "measured", state, "latency")


def _runs(found: Timings) -> Table:
    columns = (
        Column("measured at (UTC)"), Column("model"), Column("batch", "number"), Column("p50 [95 %]", "number"),
        Column("samples/s", "number"), Column("than the baseline"), Column("not used, because"),
    )  # fmt: skip
    rows = tuple(
        (
            result.created[:19].replace("T", " "),
            engine.name,
            str(result.batch),
            formats.milliseconds_interval(engine.latency.p50_ms),
            formats.significant(engine.samples_per_s),
            _speedup(engine),
            "; ".join(result.conditions.broken),
        )
        for result in reversed(found.runs)
        for engine in result.engines
    )
    return Table("Every run on this device, the newest first", columns, rows)


def _row(result: BenchResult, engine: EngineResult) -> tuple[str, ...]:
    return (
        f"{engine.name}, {engine.precision}",
        str(result.batch),
        formats.milliseconds_interval(engine.latency.p50_ms),
        formats.milliseconds_interval(engine.latency.p99_ms),
        formats.significant(engine.samples_per_s),
        _speedup(engine),
        formats.percent(result.noise_floor),
    )


def _speedup(engine: EngineResult) -> str:
    if engine.speedup is None:
        return formats.ABSENT
    return f"{engine.speedup.verdict}: {formats.times_interval(engine.speedup.latency)}"


def _threads(result: BenchResult) -> str:
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    return threads if result.streams == 1 else f"{threads}, {result.streams} streams"


def _days(found: Timings) -> str:
    days = sorted({one.result.created[:10] for one in found.newest})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def environment_section(one: Newest) -> Section:
    """Where and how the newest run was made."""
    return Section("environment", "Environment", (Tables(environment(one), "pair"),))


def environment(one: Newest) -> tuple[Table, ...]:
    """The host of a run, and the conditions that it was made under."""
    found = one.result.conditions
    conditions = (
        ("load of others", formats.percent(found.load_of_others)),
        ("stolen by a hypervisor", formats.percent(found.stolen)),
        ("throttled", "not told" if found.throttled is None else f"{found.throttled} times"),
        ("governor", found.governor or "not told"),
        *(("note", note) for note in found.notes),
        *(("broken", reason) for reason in found.broken),
    )
    names = (Column("key"), Column("value"))
    return (
        Table("Host of the measurement", names, tuple(one.result.host.items())),
        Table("Conditions of the newest run", names, conditions),
    )
