"""`gpusq calibrate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.commands.options import PATH, cache_options, data_options, json_option, range_options, student_options
from deploy.commands.printing import progress, tell
from exporters.placement import PLACEMENTS, measures

if TYPE_CHECKING:
    from deploy.cache import Cache


@click.command()
@click.argument("path", metavar="MODEL", type=PATH)
@student_options
@click.option("--profile", default="a100", show_default=True, help="The device whose graph is measured.")
@click.option(
    "--placement",
    type=click.Choice([placement for placement in PLACEMENTS if measures(placement)]),
    default="w8a8-linear",
    show_default=True,
    help="What is to be quantized.",
)
@data_options
@range_options
@click.option("--against", metavar="SOURCE", help="Other samples, to compare the ranges with.")
@cache_options
@click.option("-o", "--out", type=PATH, required=True, help="The file of the scales, in JSON.")
@json_option
def calibrate(
    path: Path,
    options: Any,
    profile: str,
    placement: Any,
    data: Any,
    method: Any,
    against: str | None,
    cache: Cache,
    out: Path,
    as_json: bool,
) -> None:
    """Measure scales for what has none in MODEL, an ONNX file or a checkpoint, into a file that --scales takes.

    Trained scales stay. A run that was interrupted goes on where it ended.
    """
    from deploy.calibrate import calibrate as run

    if data is None:
        raise click.UsageError("Missing option '--data': the samples to measure on.")
    done = run(
        path,
        out,
        data,
        profile=profile,
        placement=placement,
        method=method,
        options=options,
        against=None if against is None else dataclasses.replace(data, source=against),
        cache=cache,
        progress=progress(),
    )
    tell(done, as_json, done.to_text)
