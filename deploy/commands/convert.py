"""`gpusq convert` and `gpusq demo`: bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.commands.build_options import build_options, require_option
from deploy.commands.options import (
    PATH,
    PRECISIONS,
    cache_options,
    data_options,
    explain_option,
    graph_options,
    json_option,
    student_options,
)
from deploy.commands.printing import GATE_MISSED, progress, tell, tell_answers

if TYPE_CHECKING:
    from deploy.cache import Cache
    from deploy.conversion import Conversion


@click.command()
@click.argument("checkpoint", type=PATH)
@student_options
@click.option("--profile", "profiles", multiple=True, required=True, help="Device profile; may be given several times.")
@click.option("--out", type=PATH, required=True, help="Folder for the bundles: new, empty, or of bundles.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="auto keeps what was trained; int8 also quantizes what was not; the others drop the trained quantization.",
)
@data_options
@graph_options
@build_options
@require_option
@click.option("--baseline", type=PATH, help="Dense checkpoint to measure against, in FP32.")
@click.option("--sbom", is_flag=True, help="Write a parts list into each bundle, sbom.cdx.json, CycloneDX 1.6.")
@cache_options
@explain_option
@json_option
def convert(
    checkpoint: Path,
    options: Any,
    profiles: tuple[str, ...],
    out: Path,
    precision: Any,
    data: Any,
    graph: dict[str, Any],
    build: Any,
    required: Any,
    baseline: Path | None,
    sbom: bool,
    cache: Cache,
    explain: bool,
    as_json: bool,
) -> None:
    """Convert CHECKPOINT into one verified bundle for each profile."""
    from deploy.conversion import convert as run

    done = run(
        checkpoint,
        profiles=profiles,
        out=out,
        options=options,
        precision=precision,
        data=data,
        build=build,
        required=required,
        baseline=baseline,
        cache=cache,
        parts_list=sbom,
        progress=progress(),
        **graph,
    )
    if explain:
        tell_answers(cache)
    _tell_bundles(done, as_json)


@click.command()
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="Folder for the bundles.")
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Convert the shipped 2:4 INT8 vision transformer for a100, agx-orin and cpu, and show what was found."""
    from deploy.demo import demo as run

    _tell_bundles(run(out, progress()), as_json)


def _tell_bundles(done: Conversion, as_json: bool) -> None:
    """Print a conversion, and leave with 3 if it came out less than was asked for."""
    tell(done, as_json, done.to_text)
    if any(bundle.manifest.gates_missed for bundle in done.bundles):
        sys.exit(GATE_MISSED)
