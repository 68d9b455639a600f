"""`gpusq build`."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.commands.options import PATH, json_option
from deploy.commands.printing import progress, tell


@click.command()
@click.argument("bundle", type=PATH)
@json_option
def build(bundle: Path, as_json: bool) -> None:
    """Build TensorRT's engine for BUNDLE on the device that it is made for."""
    from deploy.finish import finish

    manifest = finish(bundle, progress())
    tell(manifest, as_json, lambda: f"{bundle}: {manifest.engines[-1].file}")
