"""Hold claims to what is known: confirmed, refuted, inconclusive, or not testable here, each with its figures.

| verdict | a figure that is certain | a figure with an interval |
|---|---|---|
| confirmed | reaches the claimed one, less its tolerance | the whole interval does |
| refuted | does not | no part of it does |
| inconclusive | never | a part of it does, or the run broke a condition |

Not testable here: what it needs is not among the results, and the verdict says what that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import Field

from deploy.claim_checks.arithmetic import ratio_of
from deploy.claim_checks.evidence import Evidence, read_evidence
from deploy.manifest import Interval
from deploy.timing.results import BenchResult, EngineResult
from profiles.claim import AT_MOST, Claim, read_claims
from profiles.record import Record

SCHEMA = 1
Verdict = Literal["confirmed", "refuted", "inconclusive", "not testable here"]


class Judged(Record):
    """A claim and what became of it."""

    claim: Claim
    verdict: Verdict
    found: Interval | None = Field(description="The figure; certain ones have an interval of no width.")
    origin: Literal["computed", "verified", "measured", "none"]
    why: tuple[str, ...] = Field(description="The arithmetic, where the figure is from, or what is missing.")


class JudgedClaims(Record):
    """All claims of a file."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    title: str
    claims: tuple[Judged, ...]

    @property
    def refuted(self) -> bool:
        """Whether a claim was refuted."""
        return any(judged.verdict == "refuted" for judged in self.claims)

    def to_text(self) -> str:
        """The verdicts for the terminal."""
        return "\n".join([self.title, "", *(line for judged in self.claims for line in _lines(judged))])


def claims(file: str, results: Iterable[str] = (), *, build: bool = False) -> JudgedClaims:
    """Judge the claims in a file.

    Args:
        file: a TOML file, or the name of a shipped one.
        results: bundles, ONNX files as `MODEL=PATH`, histories.
        build: whether to build the graphs that are missing, with random weights.

    Raises:
        GpusqError: the file or a result cannot be read, or a claim does not say enough.
    """
    found, evidence = read_claims(file), read_evidence(results, build=build)
    return JudgedClaims(title=found.title, claims=tuple(judge(claim, evidence) for claim in found.claims))


def judge(claim: Claim, evidence: Evidence) -> Judged:
    """Judge one claim."""
    if claim.what in ("size ratio", "FLOPs ratio"):
        return _by_arithmetic(claim, evidence)
    if claim.what == "accuracy drop":
        return _by_verification(claim, evidence)
    if claim.what == "energy":
        return _untestable(claim, "gpusq reads no energy on this host")
    return _by_timings(claim, evidence)


def verdict_of(claim: Claim, found: Interval) -> Verdict:
    """What an interval says of the claim."""
    low, high = found.low, found.high
    if claim.what in AT_MOST:
        low, high = -found.high, -found.low
    limit = -claim.limit if claim.what in AT_MOST else claim.limit
    if low >= limit:
        return "confirmed"
    return "refuted" if high < limit else "inconclusive"


def _by_arithmetic(claim: Claim, evidence: Evidence) -> Judged:
    cost = evidence.cost(claim)
    if cost is None:
        return _untestable(claim, f"no graph of {claim.model}: give it with --results, or build it with --build")
    computed = ratio_of(claim, cost)
    found = Interval(value=computed.value, low=computed.value, high=computed.value)
    return Judged(claim=claim, verdict=verdict_of(claim, found), found=found, origin="computed", why=computed.steps)


def _by_verification(claim: Claim, evidence: Evidence) -> Judged:
    manifest = evidence.bundles.get(claim.model) or evidence.bundles.get(claim.architecture)
    if manifest is None:
        return _untestable(claim, f"no bundle of {claim.model}, with labelled samples, among the results")
    if claim.baseline != "the student":
        return _untestable(claim, f"a bundle compares with its student, the claim with {claim.baseline}")
    if manifest.verified is None or manifest.verified.drop is None:
        return _untestable(claim, "the bundle was not verified on labelled samples")
    drop = manifest.verified.drop
    where = f"{manifest.verified.count} samples of {manifest.verified.samples}, {manifest.verified.runtime}"
    return Judged(claim=claim, verdict=verdict_of(claim, drop), found=drop, origin="verified", why=(where,))


def _by_timings(claim: Claim, evidence: Evidence) -> Judged:
    if claim.device != "cpu":
        mode = f" in {claim.power_mode}" if claim.power_mode else ""
        return _untestable(claim, f"nothing among the results was measured on {claim.device}{mode}")
    runs = list(_runs(claim, evidence))
    if not runs:
        return _untestable(
            claim,
            f"no result of {claim.model} at batch {claim.batch} beside a baseline in {claim.baseline_precision}",
        )
    result, engine = next(((r, e) for r, e in reversed(runs) if r.usable), runs[-1])
    found = _figure(claim, engine)
    where = f"{result.device}, {result.runtime}, {result.pairs} pairs, {result.created}"
    verdict = verdict_of(claim, found) if result.usable else "inconclusive"
    return Judged(claim=claim, verdict=verdict, found=found, origin="measured", why=(where, *result.conditions.broken))


def _runs(claim: Claim, evidence: Evidence) -> Iterator[tuple[BenchResult, EngineResult]]:
    """The results that the claim speaks of, the oldest first."""
    for result in evidence.timings:
        for engine in result.engines:
            named = claim.model in (engine.name, engine.sha256) and claim.batch in (None, result.batch)
            compared = engine.speedup is not None and engine.speedup.baseline_precision == claim.baseline_precision
            if named and (compared or claim.what == "latency"):
                yield result, engine


def _figure(claim: Claim, engine: EngineResult) -> Interval:
    if claim.what == "latency":
        return engine.latency.p50_ms
    assert engine.speedup is not None
    return engine.speedup.throughput if claim.what == "throughput speed-up" else engine.speedup.latency


def _untestable(claim: Claim, why: str) -> Judged:
    return Judged(claim=claim, verdict="not testable here", found=None, origin="none", why=(why,))


def _lines(judged: Judged) -> Iterator[str]:
    claim = judged.claim
    found = "" if judged.found is None else f"; {judged.origin} {_interval(judged.found)}"
    scope = f", {claim.scope}" if claim.scope else ""
    yield (
        f"{judged.verdict:17}  {claim.id}: {claim.what} {'≤' if claim.what in AT_MOST else '≥'} {claim.value:g}"
        f" beside {claim.baseline} ({claim.baseline_precision}){scope}{found}"
    )
    yield from (f"{'':19}{line}" for line in judged.why)


def _interval(found: Interval) -> str:
    if found.low == found.high:
        return f"{found.value:.4g}"
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
