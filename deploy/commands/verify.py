"""`gpusq verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from deploy.commands.options import PATH, data_options, json_option
from deploy.commands.printing import GATE_MISSED, progress, tell


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--polygraphy", is_flag=True, required=True, help="Compare the engines by Polygraphy's Comparator.")
@data_options
@click.option("--atol", type=click.FloatRange(0), default=1e-2, show_default=True, help="Absolute difference allowed.")
@click.option("--rtol", type=click.FloatRange(0), default=1e-2, show_default=True, help="Relative difference allowed.")
@click.option(
    "--out",
    type=PATH,
    default=Path("polygraphy"),
    show_default=True,
    help="Folder for inputs and outputs of what fails, with a command for each; made where something fails.",
)
@json_option
def verify(bundle: Path, polygraphy: bool, data: Any, atol: float, rtol: float, out: Path, as_json: bool) -> None:
    """Hold every engine of BUNDLE that this host can load against its model; exit with 3 where one differs too much."""
    from deploy.second_opinion import Tolerance, second_opinion

    found = second_opinion(bundle, out, data=data, tolerance=Tolerance(atol, rtol), progress=progress())
    tell(found, as_json, found.to_text)
    if found.failed:
        sys.exit(GATE_MISSED)
