"""The report of an ONNX file: what can be read from it, and what is known beside it."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.comparison.subject import Subject
from deploy.layers import noun
from deploy.prediction import Predicted
from deploy.report import formats, timed_sections
from deploy.report.bundle_page import Beside, plan_blocks, size_blocks, sparsity_blocks
from deploy.report.document import Card, Document, Section, Words
from deploy.report.predicted_section import predicted_card, predicted_section
from deploy.report.timings import Timings


def model_page(subject: Subject, beside: Beside, gpusq: str) -> Document:
    """Return the report of an ONNX file; `gpusq` is the release that writes it."""
    return Document(
        subject=subject.name,
        target="",
        facts=(("an ONNX file, as it is", ""), ("by", f"gpusq {gpusq}")),
        cards=tuple(_cards(subject, beside)),
        lines=beside.claim_lines,
        sections=tuple(_sections(subject, beside)),
        gpusq=gpusq,
        source=subject.name,
    )


def _cards(subject: Subject, beside: Beside) -> Iterator[Card]:
    if isinstance(beside.timings, Timings):
        yield timed_sections.speed_card(beside.timings)
    if isinstance(beside.predicted, Predicted):
        yield predicted_card(beside.predicted)
    if subject.plan is not None:
        fused = sum(each.fused for each in subject.plan.attentions)
        lines = (f"{fused} of {len(subject.plan.attentions)} attentions fused", f"compiled for {subject.plan.target}")
        yield Card("Plan", f"{len(subject.plan.kernels)} kernels", lines, "compiled", "open", "plan")
    pruned = sum(layer.sparsity.pattern != "dense" for layer in subject.layers)
    headline = f"{pruned} of {len(subject.layers)} {noun(subject.layers)}"
    yield Card("2:4 sparsity", headline, (), "computed", "open", "sparsity")
    if subject.sizes is not None:
        size = formats.size(subject.sizes.total_compressed)
        yield Card("Size", size, ("every parameter, as stored and compressed",), "computed", "open", "sizes")


def _sections(subject: Subject, beside: Beside) -> Iterator[Section]:
    if isinstance(beside.timings, Timings):
        yield Section("latency", "Latency", tuple(timed_sections.latency_blocks(beside.timings)), "measured")
    else:
        yield Section("latency", "Latency", (Words(f"Not measured: {beside.timings}.", "absence"),), "not here")
    yield timed_sections.throughput_section(beside.timings)
    yield predicted_section(beside.predicted)
    if subject.plan is not None:
        yield Section("plan", "Plan", tuple(plan_blocks(subject.plan)), "compiled")
    if subject.layers:
        yield Section("sparsity", "Sparsity and scales", tuple(sparsity_blocks(subject.layers, (), None)), "computed")
    if subject.sizes is not None:
        yield Section("sizes", "Sizes", tuple(size_blocks(subject.layers, subject.sizes)), "computed")
    yield from beside.claims_sections
    yield from measured_sections(beside.timings)


def measured_sections(found: Timings | str) -> Iterator[Section]:
    """The history, and the host that it was made on."""
    yield timed_sections.history_section(found)
    if isinstance(found, Timings):
        yield timed_sections.environment_section(found.newest[0])
