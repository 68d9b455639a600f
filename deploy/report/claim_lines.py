"""One line for each claim: its verdict, what was found, what is published, and of a speed what is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deploy.claims import Judged, JudgedClaims
from deploy.manifest import Interval
from deploy.prediction import Point, Predicted
from deploy.report import formats
from deploy.report.document import Line, Origin, Section, State, Tables, Words
from deploy.report.tables import Column, Table
from profiles.claim import AT_MOST, Claim
from profiles.device import load_device
from profiles.errors import GpusqError

_STATES: dict[str, State] = {"confirmed": "good", "refuted": "bad", "inconclusive": "open"}
_SPEEDS = ("latency speed-up", "throughput speed-up", "latency")


def claim_lines(found: JudgedClaims, predicted: Predicted | str, models: Sequence[str]) -> tuple[Line, ...]:
    """Return a line for each claim; `models` are the names under which claims speak of the report's subject."""
    return tuple(_line(judged, predicted, models) for judged in found.claims)


def claims_section(found: JudgedClaims, predicted: Predicted | str, models: Sequence[str]) -> Section:
    """The claims with their figures: published, found, predicted."""
    columns = (
        Column("claim", "code"),
        Column("of"),
        Column("published", "number"),
        Column("found", "number"),
        Column("found by", "origin"),
        Column("predicted", "number"),
        Column("verdict"),
        Column("source"),
    )
    rows = tuple(_row(judged, predicted, models) for judged in found.claims)
    note = Words(
        "A claim holds if its whole interval does. A prediction stands beside claims on speed, and decides nothing.",
        "note",
    )
    return Section("claims", "Claims", (note, Tables((Table(found.title, columns, rows),))), "published")


def predicted_of(claim: Claim, predicted: Predicted | str, models: Sequence[str]) -> tuple[float, float, float] | None:
    """What is predicted of a claim on speed, with its 80 % interval; None where nothing is."""
    if isinstance(predicted, str) or claim.what not in _SPEEDS or claim.model not in models:
        return None
    point = next((point for point in predicted.points if _is_about(claim, point)), None)
    if point is None:
        return None
    if claim.what == "latency":
        return point.latency_ms, point.low_ms, point.high_ms
    return None if point.speedup is None else (point.speedup.value, point.speedup.low, point.speedup.high)


def _is_about(claim: Claim, point: Point) -> bool:
    if claim.device is None or claim.batch not in (None, point.batch):
        return False
    try:
        return load_device(claim.device).name == point.profile and claim.power_mode in (None, point.power_mode)
    except GpusqError:  # a claim may name a device that has no profile
        return False


def _line(judged: Judged, predicted: Predicted | str, models: Sequence[str]) -> Line:
    claim = judged.claim
    figures = [f"{_published(claim)} published"]
    if judged.found is not None:
        figures.append(f"{_found(claim, judged.found)} {judged.origin}")
    if (guess := predicted_of(claim, predicted, models)) is not None:
        figures.append(f"{_figure(claim, guess[0])} predicted, not measured")
    origin: Origin = "not here" if judged.origin == "none" else judged.origin
    why = judged.why if judged.found is None else ()
    return Line(claim.id, judged.verdict, _STATES.get(judged.verdict, "absent"), origin, ("; ".join(figures), *why))


def _row(judged: Judged, predicted: Predicted | str, models: Sequence[str]) -> tuple[str, ...]:
    claim, guess = judged.claim, predicted_of(judged.claim, predicted, models)
    return (
        claim.id,
        ", ".join(_scope(claim)),
        _published(claim),
        formats.ABSENT if judged.found is None else _found(claim, judged.found),
        "not here" if judged.origin == "none" else judged.origin,
        formats.ABSENT if guess is None else _figure(claim, guess[0]),
        judged.verdict,
        claim.source,
    )


def _scope(claim: Claim) -> Iterator[str]:
    yield f"{claim.what} of {claim.model}"
    yield claim.format
    yield f"beside {claim.baseline} ({claim.baseline_precision})"
    if claim.scope:
        yield claim.scope
    if claim.device:
        yield f"on {claim.device}"
    if claim.batch:
        yield f"batch {claim.batch}"


def _published(claim: Claim) -> str:
    return f"{'≤' if claim.what in AT_MOST else '≥'} {_figure(claim, claim.value)}"


def _found(claim: Claim, found: Interval) -> str:
    if found.low == found.high:
        return _figure(claim, found.value)
    return f"{_figure(claim, found.value)} [{_figure(claim, found.low)}, {_figure(claim, found.high)}]"


def _figure(claim: Claim, value: float) -> str:
    if claim.what == "latency":
        return formats.milliseconds(value)
    if claim.what == "accuracy drop":
        return f"{100 * value:.2f} points"
    return f"{formats.significant(value)} mJ" if claim.what == "energy" else formats.times(value)
