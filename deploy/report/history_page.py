"""The report of a history: the newest runs of `gpusq bench`, and every run before them."""

from __future__ import annotations

from deploy.report import timed_sections
from deploy.report.bundle_page import Beside
from deploy.report.document import Document, Section
from deploy.report.model_page import measured_sections
from deploy.report.timings import Timings


def history_page(name: str, found: Timings, beside: Beside, gpusq: str) -> Document:
    """Return the report of the history in the file `name`; `gpusq` is the release that writes it."""
    first = found.runs[-1]
    return Document(
        subject=name,
        target=first.device,
        facts=(("runs", str(len(found.runs))), ("newest", first.created[:10]), ("by", f"gpusq {gpusq}")),
        cards=(timed_sections.speed_card(found),),
        lines=beside.claim_lines,
        sections=(
            Section("latency", "Latency", tuple(timed_sections.latency_blocks(found)), "measured"),
            timed_sections.throughput_section(found),
            *beside.claims_sections,
            *measured_sections(found),
        ),
        gpusq=gpusq,
        source=name,
    )
