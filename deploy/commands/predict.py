"""`gpusq predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploy.commands.options import PATH, batches_option, json_option
from deploy.commands.printing import tell


@click.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=PATH)
@click.option("--profile", "profiles", multiple=True, required=True, help="Device profile; may be given several times.")
@batches_option("Batch sizes.")
@click.option("--baseline", type=PATH, help="ONNX file or bundle to compare with, as it is.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8"]), help="Type a float32 MODEL on the way.")
@click.option("--power-mode", help="Of a Jetson, such as 30W.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=8x128", help="The shape of an input, as of plan.")
@json_option
def predict(
    path: Path,
    profiles: tuple[str, ...],
    batches: tuple[int, ...],
    baseline: Path | None,
    precision: Any,
    power_mode: str | None,
    inputs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Predict the latency of MODEL, an ONNX file, or of BUNDLE on devices that need not be here."""
    from deploy.predict import predict as run
    from exporters.signature import parse_input

    found = run(
        path,
        profiles,
        batches=batches,
        baseline=baseline,
        precision=precision,
        power_mode=power_mode,
        inputs=tuple(map(parse_input, inputs)),
    )
    tell(found, as_json, found.to_text)
