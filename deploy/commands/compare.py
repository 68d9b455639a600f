"""`gpusq compare`: the gate of a CI job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.commands.bench import db_option
from deploy.commands.gathered import gathered
from deploy.commands.options import PATH, json_option
from deploy.commands.printing import GATE_MISSED, tell

if TYPE_CHECKING:
    from deploy.comparison.metrics import Gate

_METRICS = ("p50", "p99", "throughput", "accuracy", "size", "kernels", "peak-memory")


def _gate(max_regression: str, max_drop: str, metrics: tuple[str, ...], last: int) -> Gate:
    from deploy.comparison.metrics import Gate

    return Gate(_share(max_regression), _share(max_drop), metrics, last)  # type: ignore[arg-type]  # click checked them


def _share(text: str) -> float:
    """The share that `3%` or `0.03` names."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise click.UsageError(f"{text!r} is no share: write 3% or 0.03")
    return share


@click.command()
@click.option("--baseline", required=True, help="A bundle, an ONNX file, gpusq.db, or gpusq.db:NAME.")
@click.option("--candidate", required=True, help="The same.")
@gathered(
    "gate",
    _gate,
    click.option("--max-regression", default="3%", show_default=True, help="By how much a metric may become worse."),
    click.option("--max-drop", default="1%", show_default=True, help="By how many points the accuracy may fall."),
    click.option(
        "--metric",
        "metrics",
        multiple=True,
        type=click.Choice(_METRICS),
        help="Judge this one; may be given several times.  [default: all that are known of both]",
    ),
    click.option(
        "--last", type=click.IntRange(1), default=1, show_default=True, help="Of how many runs in the history."
    ),
)
@click.option("--profile", help="The device that ONNX files are compiled for.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path, exists=True),
    help="An ONNX file whose answers on random inputs both are held to.",
)
@click.option("--markdown", type=PATH, help="Write the comparison to this Markdown file as well.")
@click.option("--junit", type=PATH, help="Write it to this JUnit XML file as well.")
@db_option
@json_option
def compare(
    baseline: str,
    candidate: str,
    gate: Gate,
    profile: str | None,
    reference: Path | None,
    markdown: Path | None,
    junit: Path | None,
    db: Path,
    as_json: bool,
) -> None:
    """Say whether CANDIDATE is worse than BASELINE, and why, block by block; exit with 3 if it is.

    In GitHub Actions the result is appended to the job's summary.
    """
    from deploy.compare import compare as run
    from deploy.comparison.formats import append_summary, to_junit, to_markdown

    found = run(baseline, candidate, gate, profile=profile, reference=reference, db=db)
    append_summary(found)
    for path, text in ((markdown, to_markdown), (junit, to_junit)):
        if path is not None:
            path.write_text(text(found), encoding="utf-8")
    tell(found, as_json, lambda: to_markdown(found))
    if found.verdict == "regression":
        sys.exit(GATE_MISSED)
