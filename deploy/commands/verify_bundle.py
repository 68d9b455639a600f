"""`gpusq verify-bundle` and `gpusq sign`: is a bundle whole, and whose is it?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.commands.options import PATH, json_option
from deploy.commands.printing import GATE_MISSED, tell


@click.command("verify-bundle")
@click.argument("bundle", type=PATH)
@click.option("--public-key", type=PATH, help="PEM file; the signature must be of its key.")
@click.option("--runs-here", is_flag=True, help="Exit with 3 if no engine of BUNDLE fits this host.")
@json_option
def verify_bundle(bundle: Path, public_key: Path | None, runs_here: bool, as_json: bool) -> None:
    """Check every file of BUNDLE against its manifest, its signature, and which of its engines fit this host."""
    from deploy.verify_bundle import verify_bundle as run

    found = run(bundle, public_key)
    tell(found, as_json, found.to_text)
    if runs_here and not any(engine.fits for engine in found.engines):
        sys.exit(GATE_MISSED)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, required=True, help="PEM file with a private Ed25519 key, not encrypted.")
def sign(bundle: Path, key: Path) -> None:
    """Sign the manifest of BUNDLE, which names every file by its hash."""
    from deploy.signature import sign as run

    click.echo(run(bundle, key))
