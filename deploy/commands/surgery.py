"""`gpusq surgery`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.commands.options import (
    PATH,
    PRECISIONS,
    cache_options,
    data_options,
    graph_options,
    json_option,
    student_options,
)
from deploy.commands.printing import progress, tell

if TYPE_CHECKING:
    from deploy.cache import Cache


@click.command()
@click.argument("path", metavar="MODEL", type=PATH)
@student_options
@click.option("--profile", required=True, help="Device profile that the graph is made for.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True, help="As of convert.")
@data_options
@graph_options
@cache_options
@click.option("-o", "--out", type=PATH, required=True, help="The ONNX file to write.")
@json_option
def surgery(
    path: Path,
    options: Any,
    profile: str,
    precision: Any,
    data: Any,
    graph: dict[str, Any],
    cache: Cache,
    out: Path,
    as_json: bool,
) -> None:
    """Write the graph of MODEL, an ONNX file or a checkpoint, that the device's compiler fuses best.

    Trained scales stay; every change is told, and what was left alone, with the reason.
    """
    from deploy.surgery import operate

    done = operate(
        path,
        out,
        profile=profile,
        options=options,
        precision=precision,
        data=data,
        cache=cache,
        progress=progress(),
        **graph,
    )
    tell(done, as_json, done.to_text)
