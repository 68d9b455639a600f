"""Finish a bundle on its device: build TensorRT's engine and write that into the manifest and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy import sbom
from deploy.build_options import BuildOptions
from deploy.bundle import hash_file, hash_files, staged_copy
from deploy.cache import Cache
from deploy.cached_build import CachedBuild
from deploy.device_engine import DEVICE_ENGINE, Via
from deploy.gates import missed_requirements
from deploy.manifest import FILE_NAME, SIGNATURE_NAME, Manifest, read_manifest
from deploy.progress import Progress
from deploy.report import HTML_NAME, MARKDOWN_NAME, report
from deploy.requirements import Requirement, parse_requirement
from profiles.errors import GpusqError


def finish(
    bundle: Path,
    progress: Progress | None = None,
    *,
    options: BuildOptions | None = None,
    required: Sequence[Requirement] = (),
    via: Via = "python",
    cache: Cache | None = None,
) -> Manifest:
    """Build the engine that `bundle` lacks and return its new manifest.

    Args:
        bundle: the folder.
        progress: is told what goes on.
        options: what is asked of the builder.
        required: what the engine must come to, beside what the manifest says.
        via: what builds it.
        cache: takes what was built before; nothing is kept without one.

    Raises:
        GpusqError: it is no bundle, a file in it was changed, nothing is missing, or this host is not the device.
    """
    progress = progress or Progress()
    read_manifest(bundle)  # before anything is copied
    with staged_copy(bundle) as copy:
        manifest = read_manifest(copy)
        check_files(copy, manifest)
        if not any(missing.what == DEVICE_ENGINE for missing in manifest.missing):
            raise GpusqError(f"{bundle} has its engine already", hint="convert the checkpoint again to replace it")
        device, options, cache = manifest.device_profile, options or BuildOptions(), cache or Cache(None)
        how = CachedBuild(bundle.name, device, options, cache, progress, via)
        built = how.on_device(copy)
        (engine,), plan = built.engines, built.plan or manifest.plan
        wanted = (*required, *map(parse_requirement, manifest.required))
        gates = missed_requirements(
            plan, (engine,), float_type=manifest.float_type, placement="as-trained", required=wanted
        )
        manifest = manifest.model_copy(
            update={
                "engines": (*manifest.engines, engine),
                "missing": tuple(missing for missing in manifest.missing if missing.what != DEVICE_ENGINE),
                "plan": plan,
                "gates_missed": tuple(dict.fromkeys((*manifest.gates_missed, *(each.sentence for each in gates)))),
            }
        )
        return seal(manifest, copy)


def seal(manifest: Manifest, bundle: Path, *, parts_list: bool = False) -> Manifest:
    """Write report and manifest of the finished files in `bundle`, and return the manifest with every hash.

    A parts list is written where it is asked for, and written anew where there is one.
    """
    parts_list = parts_list or (bundle / sbom.FILE_NAME).is_file()
    for name in (HTML_NAME, MARKDOWN_NAME, SIGNATURE_NAME, sbom.FILE_NAME):  # a signature would be of what was
        (bundle / name).unlink(missing_ok=True)
    manifest = manifest.model_copy(update={"files": hash_files(bundle)})
    report(manifest, bundle)
    return write_manifest(manifest, bundle, parts_list=parts_list)


def write_manifest(manifest: Manifest, bundle: Path, *, parts_list: bool) -> Manifest:
    """Write the manifest with the hash of every file in `bundle`, before it the parts list if there is to be one."""
    if parts_list:
        (bundle / sbom.FILE_NAME).unlink(missing_ok=True)
        text = sbom.sbom(manifest, hash_files(bundle))
        (bundle / sbom.FILE_NAME).write_text(text, encoding="utf-8")
    manifest = manifest.model_copy(update={"files": hash_files(bundle)})
    (bundle / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def check_files(bundle: Path, manifest: Manifest) -> None:
    """Raise GpusqError for the first file of `bundle` that is missing or not the one in the manifest."""
    for name, entry in manifest.files.items():
        path = bundle / name
        if not path.is_file() or hash_file(path) != entry:
            raise GpusqError(f"{path} is not the file that the manifest names", hint="convert the checkpoint again")
