"""`gpusq profiles`."""

from __future__ import annotations

import shutil

import click

from deploy.commands.options import json_option
from deploy.commands.printing import tell


@click.command()
@click.argument("name", required=False)
@click.option("--power-mode", help="Show NAME as it is in this power mode.")
@click.option("--detect", is_flag=True, help="Print the name of this host's own profile, and to stderr why.")
@json_option
def profiles(name: str | None, power_mode: str | None, detect: bool, as_json: bool) -> None:
    """List the device profiles, or show the one called NAME, which may be the path of your own."""
    if detect:
        _detect(name, as_json)
        return
    if power_mode and not name:
        raise click.UsageError("--power-mode needs the name of a profile")
    from deploy.show_profiles import list_text, one_text, show_profiles
    from profiles.device import list_devices, load_device

    devices = [load_device(name)] if name else list_devices()
    shown = show_profiles(device.at(power_mode) if power_mode else device for device in devices)
    width = shutil.get_terminal_size().columns
    tell(shown, as_json, lambda: one_text(shown.profiles[0], width) if name else list_text(shown, width))


def _detect(name: str | None, as_json: bool) -> None:
    if name:
        raise click.UsageError("--detect takes no name")
    from deploy.detect import detect

    found = detect()
    if not as_json:
        click.echo(found.why, err=True)
    tell(found, as_json, lambda: found.profile)
