"""The report of a bundle: its manifest, its raw samples, and what is known beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.claims import JudgedClaims
from deploy.manifest import Engine, Layer, Manifest, Plan, Sizes
from deploy.prediction import Predicted
from deploy.report import formats, plan_picture, size_bars, tables, timed_sections, verdicts
from deploy.report.claim_lines import claim_lines, claims_section
from deploy.report.distributions import distribution
from deploy.report.document import Block, Card, Document, Figure, Folded, Line, Section, Sentences, Steps, Tables, Words
from deploy.report.gate_lines import gate_lines
from deploy.report.predicted_section import predicted_card, predicted_section
from deploy.report.samples import Samples
from deploy.report.tables import Table
from deploy.report.timings import Timings

NOT_ASKED = "`gpusq report` looks for it"


@dataclass(frozen=True)
class Beside:
    """What is known of a model besides its manifest.

    Attributes:
        timings: its runs in a history, or why there are none.
        predicted: its latency on a device, or why nothing is predicted.
        claims: claims that were judged; None where none were given.
        models: the names under which claims speak of it.
    """

    timings: Timings | str = NOT_ASKED
    predicted: Predicted | str = NOT_ASKED
    claims: JudgedClaims | None = None
    models: tuple[str, ...] = ()

    @property
    def claim_lines(self) -> tuple[Line, ...]:
        """A line for each claim."""
        return () if self.claims is None else claim_lines(self.claims, self.predicted, self.models)

    @property
    def claims_sections(self) -> tuple[Section, ...]:
        """The section on the claims, where there are any."""
        return () if self.claims is None else (claims_section(self.claims, self.predicted, self.models),)


def bundle_page(manifest: Manifest, samples: Samples | None, beside: Beside | None = None) -> Document:
    """Return the report of a bundle.

    Args:
        manifest: what is known of it.
        samples: the raw latencies of its measurement; None where there is none.
        beside: what else is known.
    """
    beside = beside or Beside()
    cards = tuple(
        _speed_card(beside) or card if card.title == "Speed" and card.state == "absent" else card
        for card in verdicts.cards(manifest)
    )
    return Document(
        subject=verdicts.student_name(manifest),
        target=manifest.device,
        facts=(
            ("precision", verdicts.precision(manifest)),
            ("profile", manifest.profile),
            ("made", manifest.created[:10]),
            ("by", f"gpusq {manifest.gpusq}"),
        ),
        cards=cards,
        lines=(*gate_lines(manifest), *beside.claim_lines),
        sections=tuple(_sections(manifest, samples, beside)),
        gpusq=manifest.gpusq,
        source="manifest.json",
    )


def _speed_card(beside: Beside) -> Card | None:
    if isinstance(beside.timings, Timings):
        return timed_sections.speed_card(beside.timings)
    return predicted_card(beside.predicted) if isinstance(beside.predicted, Predicted) else None


def _sections(m: Manifest, samples: Samples | None, beside: Beside) -> Iterator[Section]:
    if m.gates_missed:
        yield Section("gates", "Less than was asked for", (Sentences(tuple((each, True) for each in m.gates_missed)),))
    yield Section("missing", "What is missing, and how to finish it", (_missing(m),))
    yield Section("accuracy", "Accuracy", (_accuracy(m),), "verified" if m.verified else "not here")
    timed = m.measured is not None or isinstance(beside.timings, Timings)
    blocks = tuple(_latency(m, samples, beside))
    yield Section("latency", "Latency", blocks, "measured" if timed else "not here")
    yield timed_sections.throughput_section(beside.timings)
    yield predicted_section(beside.predicted)
    yield Section("plan", "Plan", tuple(_plan(m)), "compiled" if m.plan or m.engines else "not here")
    yield Section("sparsity", "Sparsity and scales", tuple(_sparsity(m)), "computed")
    yield Section("sizes", "Sizes", tuple(size_blocks(m.layers, m.sizes)), "computed")
    yield from beside.claims_sections
    yield timed_sections.history_section(beside.timings)
    yield Section("surgery", "What the graph surgery did", tuple(_surgery(m)))
    yield Section("environment", "Environment", tuple(_environment(m, beside)))


def _missing(m: Manifest) -> Block:
    return Steps(m.missing) if m.missing else Words("Nothing is listed as missing.", "absence")


def _accuracy(m: Manifest) -> Block:
    if m.verified is None:
        return Words("Not verified here: model.onnx was not compared with the student.", "absence")
    return Tables((tables.verification(m.verified),), "pair")


def _latency(m: Manifest, samples: Samples | None, beside: Beside) -> Iterator[Block]:
    if m.measured is not None and samples is not None:
        yield Words(verdicts.speed(m.measured))
        yield Words(f"Measured on {m.measured.device}: {verdicts.conditions(m.measured)}.", "note")
        yield Tables((tables.latency(m.measured),))
        compared = m.measured.baseline is not None and samples.baseline
        of = {"student": samples.student} | ({"baseline": samples.baseline} if compared else {})
        drawn = distribution("latency-plot", of, m.measured.device)
        caption = f"{drawn.caption} Every sample is in {m.measured.raw}."
        yield Figure(drawn.id, drawn.drawing, drawn.alternative, drawn.origin, caption)
    elif not isinstance(beside.timings, Timings):
        yield Words("Not measured: a latency is taken on the device itself, never derived.", "absence")
    if isinstance(beside.timings, Timings):
        yield from timed_sections.latency_blocks(beside.timings)
    if m.predicted:
        yield Tables((tables.predictions(m.predicted),))


def _plan(m: Manifest) -> Iterator[Block]:
    if m.engines:
        yield Tables((tables.engines(m.engines, m.measured),))
    else:
        yield Words("No engine: not built here.", "absence")
    if m.plan is None:
        yield Words("No plan: nothing was compiled here, so nothing is known about types and fusion.", "absence")
        return
    yield Words(verdicts.plan(m.plan, m.engines))
    yield from plan_blocks(m.plan)


def plan_blocks(plan: Plan) -> Iterator[Block]:
    """The picture of a plan, and its tables."""
    if plan.kernels:
        yield plan_picture.compiled(plan)
    summaries = [tables.gemms(plan)]
    summaries += [tables.attentions(plan)] if plan.attentions else []
    summaries += [tables.blocks(plan)] if plan.kernels_per_block else []
    yield Tables(tuple(summaries))
    yield Folded(f"Every kernel ({formats.count(len(plan.kernels))})", tables.kernels(plan))


def _sparsity(m: Manifest) -> Iterator[Block]:
    if not m.layers:
        yield Words("The model has no linear layer.", "absence")
        return
    yield Words(verdicts.chosen(m.layers, m.engines))
    yield from sparsity_blocks(m.layers, m.engines, m.plan)


def sparsity_blocks(layers: tuple[Layer, ...], engines: tuple[Engine, ...], plan: Plan | None) -> Iterator[Block]:
    """How many layers are left at each step, each of them, and the reasons that several share."""
    yield size_bars.funnel(layers, engines)
    yield Tables((tables.layers(layers, plan),), "wide")
    if notes := tables.shared_reasons(layers, plan):
        yield Tables((tables.reasons(notes),))


def size_blocks(layers: tuple[Layer, ...], sizes: Sizes) -> Iterator[Block]:
    """The arithmetic of a compressed weight, and the bytes of all."""
    for line in verdicts.arithmetic(layers):
        yield Words(line, "formula")
    yield Words(verdicts.sizes(sizes), "note")
    if sizes.total_fp32:
        yield size_bars.sizes(sizes)
    yield Tables((tables.sizes(sizes),))


def _surgery(m: Manifest) -> Iterator[Block]:
    if m.placements:
        yield Tables((tables.placements(m.placements),))
    if m.mixed_precision and m.mixed_precision.left:
        yield Tables((tables.mixed_precision(m.mixed_precision),))
    if not m.passes:
        yield Words("No pass ran over the graph.", "absence")
        return
    yield Tables((tables.surgery(m.passes),))
    for one in m.passes:
        if one.left_alone:
            count = formats.count(len(one.left_alone))
            yield Folded(f"{count} left alone by {one.name}", tables.left_alone(one))


def _environment(m: Manifest, beside: Beside) -> Iterator[Block]:
    made: list[Table] = [tables.build(m)]
    made += [tables.pairs("Host that made the bundle", m.host)] if m.host else []
    made += [tables.pairs("Versions", m.versions)] if m.versions else []
    if isinstance(beside.timings, Timings):
        made += timed_sections.environment(beside.timings.newest[0])
    yield Tables(tuple(made), "pair")
    sources = [tables.checkpoint("Student", m.student)]
    sources += [tables.checkpoint("Baseline", m.baseline)] if m.baseline else []
    yield Tables(tuple(sources), "pair")
    if m.files:
        yield Tables((tables.files(m.files),))
