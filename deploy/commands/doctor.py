"""`gpusq doctor`."""

from __future__ import annotations

import sys

import click

from deploy.commands.options import json_option
from deploy.commands.printing import tell


@click.command()
@click.option("--quiet", is_flag=True, help="Print nothing; exit 0 if this host can convert or build, else 1.")
@json_option
def doctor(quiet: bool, as_json: bool) -> None:
    """Say what this host has, what it can do with that, and what to install for the rest."""
    from deploy.doctor import diagnose

    found = diagnose()
    if not quiet:
        tell(found, as_json, found.to_text)
    elif not found.is_useful:
        sys.exit(1)
