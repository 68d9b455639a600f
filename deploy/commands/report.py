"""`gpusq report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.commands.gathered import gathered
from deploy.commands.options import PATH, batches_option, json_option
from deploy.commands.printing import tell

if TYPE_CHECKING:
    from deploy.write_report import ReportSpec


def _spec(
    history: Path | None,
    profile: str | None,
    predict: bool,
    batches: tuple[int, ...],
    baseline: Path | None,
    claims: str | None,
) -> ReportSpec:
    from deploy.write_report import ReportSpec

    return ReportSpec(history, profile, predict, batches, baseline, claims)


@click.command()
@click.argument("given", metavar="BUNDLE|MODEL|DB [CANDIDATE]", nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, help="The page.  [default: in the bundle, or report.html]")
@gathered(
    "spec",
    _spec,
    click.option("--history", type=PATH, help="Results of bench.  [default: gpusq.db, if there is one]"),
    click.option("--profile", help="The device that ONNX files are compiled and predicted for."),
    click.option("--predict/--no-predict", default=True, show_default=True, help="Predict the latency on the device."),
    batches_option("Batch sizes to predict."),
    click.option("--baseline", type=PATH, help="ONNX file or bundle that the prediction is compared with."),
    click.option("--claims", metavar="FILE", help="Claims to judge: TOML, or the name of a shipped file."),
)
@json_option
def report(given: tuple[str, ...], out: Path | None, spec: ReportSpec, as_json: bool) -> None:
    """Write the report of a bundle, a model or a history, or of two beside each other, the baseline first.

    The page is one HTML file that loads nothing; the Markdown beside it says the same.
    """
    from deploy.write_report import write_report

    if len(given) > 2:
        raise click.UsageError("Give one, or two to compare.")
    found = write_report(given, out, spec)
    tell(found, as_json, found.to_text)
