"""`gpusq export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploy.commands.options import PATH, json_option, student_options
from deploy.commands.printing import progress, tell


@click.command()
@click.argument("checkpoint", type=PATH)
@student_options
@click.option("-o", "--out", type=PATH, required=True, help="The ONNX file to write.")
@click.option("--opset", type=click.IntRange(18, 23), default=23, show_default=True, help="Opset of the graph.")
@json_option
def export(checkpoint: Path, options: Any, out: Path, opset: int, as_json: bool) -> None:
    """Export CHECKPOINT, a file or a folder of any kind, as one clean ONNX file with its trained scales."""
    from deploy.export import export as run

    done = run(checkpoint, out, options, opset=opset, progress=progress())
    tell(done, as_json, done.to_text)
