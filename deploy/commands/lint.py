"""`gpusq lint`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.commands.options import PATH, json_option
from deploy.commands.printing import GATE_MISSED, tell


@click.command()
@click.argument("model", type=PATH)
@click.option("--profile", required=True, help="The device whose parser and compiler must take MODEL.")
@click.option("--sarif", type=PATH, help="Write the findings to this file as well, in SARIF 2.1.0.")
@json_option
def lint(model: Path, profile: str, sarif: Path | None, as_json: bool) -> None:
    """Check MODEL, an ONNX file, against the hard rules of the device's compiler; exit with 3 if one is broken."""
    from deploy.lint import lint as run

    found = run(model, profile)
    if sarif is not None:
        from deploy.environment import versions
        from deploy.sarif import to_sarif

        sarif.write_text(to_sarif(found, model, versions().get("gpusq", "unknown")), encoding="utf-8")
    tell(found, as_json, found.to_text)
    if found.errors:
        sys.exit(GATE_MISSED)
