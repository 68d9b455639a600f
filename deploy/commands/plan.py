"""`gpusq plan`."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.commands.options import PATH, json_option
from deploy.commands.printing import tell


@click.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=PATH)
@click.option("--profile", help="The device to compile MODEL for; a bundle names its own.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=8x3x224x224",
    help="The usual shape of an input, where it varies in more than the batch; the bytes moved are those of it.",
)
@json_option
def plan(path: Path, profile: str | None, inputs: tuple[str, ...], as_json: bool) -> None:
    """Show the kernels that the device's compiler makes of MODEL, or has made of BUNDLE.

    MODEL is compiled with TensorRT-RTX; no GPU is needed.
    """
    from deploy.show_plan import show_plan
    from exporters.signature import parse_input

    found = show_plan(path, profile, tuple(map(parse_input, inputs)))
    tell(found, as_json, found.to_text)
