"""Build engines, or take those that were built before of the same model, for the same device, by the same runtimes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deploy import build as building
from deploy.build import MODEL_FILE, BuildResult
from deploy.build_options import BuildOptions
from deploy.cache import Cache
from deploy.progress import Progress
from deploy.stages import build_key
from profiles.device import Device

_NAME = "NAME-OF-THE-BUNDLE"  # in what is kept, for the name that differs from folder to folder


def cached_build(
    bundle: Path, device: Device, options: BuildOptions, *, name: str, cache: Cache, progress: Progress
) -> BuildResult:
    """Build as `deploy.build.build` does, into the folder `bundle`, which holds `model.onnx`.

    Args:
        bundle: the folder.
        device: the profile.
        options: what is asked of the builders.
        name: of the bundle, in the command that the user is told to run on the device.
        cache: where builds are kept.
        progress: is told what goes on.
    """

    def make() -> BuildResult:
        with progress.working(f"building for {device.title}"):
            return building.build(bundle, device, name=_NAME, options=options)

    key = build_key(bundle / MODEL_FILE, device, options)
    built = cache.fetch(key, bundle, make, BuildResult, bundle=bundle.name)
    missing = (one.model_copy(update={"how": one.how.replace(_NAME, name)}) for one in built.missing)
    return dataclasses.replace(built, missing=tuple(missing))
