"""`gpusq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploy.commands.options import PATH, json_option, scale_options
from deploy.commands.printing import tell


@click.command()
@click.argument("path", metavar="MODEL|BUNDLE|CHECKPOINT", type=PATH)
@click.option("--profile", help="Judge the sparsity by this profile's kernels; a bundle names its own.")
@scale_options
@json_option
def inspect(path: Path, profile: str | None, options: Any, as_json: bool) -> None:
    """Show the sparsity and the Q/DQ of each linear layer in a model or a bundle, or what a checkpoint holds."""
    from deploy.inspect import inspect as run

    found = run(path, profile, options)
    tell(found, as_json, found.to_text)
