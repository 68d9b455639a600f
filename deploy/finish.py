"""Finish a bundle on its device: build TensorRT's engine and write that into the manifest and the report."""

from __future__ import annotations

from pathlib import Path

from deploy.build import build_on_device
from deploy.bundle import hash_file, hash_files, staged_copy
from deploy.manifest import FILE_NAME, Manifest, read_manifest
from deploy.progress import Progress
from deploy.report import report
from profiles.device import load_device
from profiles.errors import GpusqError


def finish(bundle: Path, progress: Progress | None = None) -> Manifest:
    """Build the engine that `bundle` lacks and return its new manifest.

    Raises:
        GpusqError: it is no bundle, a file in it was changed, nothing is missing, or this host is not the device.
    """
    progress = progress or Progress()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    if not manifest.missing:
        raise GpusqError(f"{bundle} has every engine already", hint="convert the checkpoint again to replace it")
    device = load_device(manifest.profile)
    with staged_copy(bundle) as copy:
        with progress.working(f"building for {device.title}"):
            engine = build_on_device(copy, device)
        manifest = manifest.model_copy(update={"engines": (*manifest.engines, engine), "missing": ()})
        report(manifest, copy)
        manifest = manifest.model_copy(update={"files": hash_files(copy)})
        (copy / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Raise GpusqError for the first file of `bundle` that is missing or not the one in the manifest."""
    for name, entry in manifest.files.items():
        path = bundle / name
        if not path.is_file() or hash_file(path) != entry:
            raise GpusqError(f"{path} is not the file that the manifest names", hint="convert the checkpoint again")
