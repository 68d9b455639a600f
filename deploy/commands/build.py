"""`gpusq build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from deploy.commands.build_options import build_options, require_option
from deploy.commands.options import PATH, cache_options, explain_option, json_option
from deploy.commands.printing import GATE_MISSED, progress, tell, tell_answers


@click.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=PATH)
@click.option("--profile", help="The device to build MODEL for; a bundle names its own.")
@click.option("--out", type=PATH, help="Folder for the engines of MODEL.")
@build_options
@require_option
@click.option("--print-trtexec", is_flag=True, help="Print the command of trtexec for each line of TensorRT, and stop.")
@click.option("--via", type=click.Choice(["python", "trtexec"]), default="python", show_default=True,
              help="What builds TensorRT's engine on the device.")  # fmt: skip
@cache_options
@explain_option
@json_option
def build(
    path: Path,
    profile: str | None,
    out: Path | None,
    build: Any,
    required: Any,
    print_trtexec: bool,
    via: Any,
    cache: Any,
    explain: bool,
    as_json: bool,
) -> None:
    """Build engines of MODEL, or the one that BUNDLE lacks, on the device that it is made for.

    MODEL is an ONNX file, typed as `gpusq surgery` leaves it. Its engines, their plan and what is less than required go
    into the folder --out: TensorRT-RTX's on any machine, TensorRT's on the device.
    """
    from deploy.build_command import build_bundle, print_commands
    from deploy.build_model import build_model, gates_text

    if print_trtexec:
        click.echo(print_commands(path, profile, build))
        return
    if path.is_dir():
        if profile is not None or out is not None:
            raise click.UsageError(
                "a bundle names its own profile and takes its own engine: leave out --profile and --out"
            )
        manifest, gates = build_bundle(path, build, required, via, cache, progress())
        tell(manifest, as_json, lambda: f"{path}: {manifest.engines[-1].file}")
    else:
        if profile is None or out is None:
            raise click.UsageError("a model needs --profile, the device, and --out, the folder for its engines.")
        done = build_model(
            path, out, profile=profile, options=build, required=required, via=via, cache=cache, progress=progress()
        )
        gates = gates_text(done)
        tell(done, as_json, done.to_text)
    if explain:
        tell_answers(cache)
    if gates:
        click.echo(gates, err=as_json)
        sys.exit(GATE_MISSED)
