"""The command line: its commands are in `deploy.commands`.

Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 a gate was missed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from deploy.commands.bench import bench, history
from deploy.commands.build import build
from deploy.commands.calibrate import calibrate
from deploy.commands.claims import claims
from deploy.commands.compare import compare
from deploy.commands.convert import convert, demo
from deploy.commands.doctor import doctor
from deploy.commands.export import export
from deploy.commands.inspect import inspect
from deploy.commands.lint import lint
from deploy.commands.pack import pack, unpack
from deploy.commands.plan import plan
from deploy.commands.predict import predict
from deploy.commands.profiles import profiles
from deploy.commands.report import report
from deploy.commands.surgery import surgery
from deploy.commands.verify import verify
from deploy.commands.verify_bundle import sign, verify_bundle
from profiles.errors import GpusqError


class _Commands(click.Group):
    """Turns what a user can mend into two lines and exit code 1; everything else keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GpusqError as error:
            _fail(ctx, error.message, error.hint, error)
        except OSError as error:
            if error.filename is None:
                raise
            name = os.fsdecode(error.filename)
            _fail(
                ctx,
                f"{name}: {(error.strerror or 'it cannot be used').lower()}",
                "check the path and its rights",
                error,
            )
        return None


def _fail(ctx: click.Context, message: str, hint: str, error: Exception) -> None:
    click.echo(f"Error: {message}", err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    logging.getLogger(__name__).debug("where it was raised:", exc_info=error)
    ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpusq", message="%(package)s %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens inside, to stderr.")
def main(verbose: bool) -> None:
    """Ship 2:4-sparse and quantized networks to NVIDIA GPUs.

    A trained checkpoint goes in; for each device profile a verified bundle comes out: ONNX with the trained scales and
    2:4 annotations, an engine, a manifest and a report.
    """
    signal.signal(signal.SIGTERM, _terminate)
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.captureWarnings(capture=True)


for command in (
    export, convert, surgery, calibrate, demo, build, bench, history, compare, claims, report, profiles, doctor,
    inspect, plan, predict, lint, pack, unpack, verify, verify_bundle, sign,
):  # fmt: skip
    main.add_command(command)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that half-made files are removed."""
    sys.exit(128 + number)
