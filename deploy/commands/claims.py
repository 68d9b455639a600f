"""`gpusq claims`."""

from __future__ import annotations

import sys

import click

from deploy.commands.options import json_option
from deploy.commands.printing import GATE_MISSED, tell


@click.command()
@click.argument("file")
@click.option(
    "--results",
    multiple=True,
    metavar="DB|BUNDLE|MODEL=ONNX",
    help="What the claims are held to; may be given several times.",
)
@click.option("--build", is_flag=True, help="Build the graphs that are missing, with random weights: shapes decide.")
@json_option
def claims(file: str, results: tuple[str, ...], build: bool, as_json: bool) -> None:
    """Say which claims in FILE, TOML or the name of a shipped one, hold; exit with 3 if one is refuted."""
    from deploy.claims import claims as run

    found = run(file, results, build=build)
    tell(found, as_json, found.to_text)
    if found.refuted:
        sys.exit(GATE_MISSED)
