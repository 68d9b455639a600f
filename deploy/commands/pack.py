"""`gpusq pack` and `gpusq unpack`: a bundle as one file, and back."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.commands.options import PATH, json_option
from deploy.commands.printing import tell


@click.command()
@click.argument("bundle", type=PATH)
@click.option("-o", "--out", type=PATH, help="The archive.  [default: its name and .tar.zst]")
@click.option(
    "--level", type=click.IntRange(1, 22), default=12, show_default=True, help="Of zstd: higher is smaller and slower."
)
@json_option
def pack(bundle: Path, out: Path | None, level: int, as_json: bool) -> None:
    """Pack BUNDLE into one .tar.zst, its 2:4 weights by their exact layout; `gpusq unpack` gives the same bytes."""
    from deploy.pack import pack as run

    packed = run(bundle, out, level=level)
    tell(packed, as_json, packed.to_text)


@click.command()
@click.argument("archive", type=PATH)
@click.option("--out", type=PATH, required=True, help="Folder for the bundle: new, empty, or of bundles.")
def unpack(archive: Path, out: Path) -> None:
    """Unpack ARCHIVE, made by `gpusq pack`, into the folder --out, and check every file against its manifest."""
    from deploy.unpack import unpack as run

    click.echo(run(archive, out))
