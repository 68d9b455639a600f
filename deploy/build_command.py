"""What `gpusq build` does with a bundle, and the commands of trtexec that it prints instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.build_options import BuildOptions
from deploy.cache import Cache
from deploy.device_engine import Via
from deploy.finish import finish
from deploy.gates import sentences_text
from deploy.manifest import MODEL_FILE, Manifest, is_bundle, read_manifest
from deploy.progress import Progress
from deploy.requirements import Requirement
from deploy.trtexec import commands
from profiles.device import load_device
from profiles.errors import GpusqError


def build_bundle(
    bundle: Path, options: BuildOptions, required: Sequence[Requirement], via: Via, cache: Cache, progress: Progress
) -> tuple[Manifest, str]:
    """Build the engine that `bundle` lacks; return the new manifest, and the gates that it misses, as text."""
    manifest = finish(bundle, progress, options=options, required=required, via=via, cache=cache)
    return manifest, sentences_text(manifest.gates_missed, manifest.plan)


def print_commands(path: Path, profile: str | None, options: BuildOptions) -> str:
    """The command of trtexec for each line of TensorRT that the device has, with the line as a comment before it.

    Raises:
        GpusqError: no profile is known, or the device runs no TensorRT.
    """
    if is_bundle(path):
        device, model = read_manifest(path).device_profile, path / MODEL_FILE
    elif profile is None:
        raise GpusqError(f"no profile to build {path.name} for", hint="add --profile, such as --profile a100")
    else:
        device, model = load_device(profile), path
    found = commands(device, model, options)
    if not found:
        raise GpusqError(f"{device.title} runs no TensorRT", hint="choose the profile of a GPU: `gpusq profiles`")
    return "\n".join(f"# TensorRT {line.version}\n{said}" for line, said in found)
