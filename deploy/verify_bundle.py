"""Is a bundle whole, whose is it, and which of its engines fit this host?"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from deploy.bundle import hash_files
from deploy.engine import unfit
from deploy.engine_fit import why_not_its_device
from deploy.finish import check_files
from deploy.manifest import SIGNATURE_NAME, Engine, Manifest, read_manifest
from deploy.signature import check_signature
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1


class EngineCheck(Record):
    """Whether one engine fits this host."""

    file: str
    runtime: str
    runtime_version: str
    target: str
    fits: bool
    why: str = Field(description="Why it does not; empty where it does.")


class BundleCheck(Record):
    """What `verify_bundle` found in a bundle that is whole."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    bundle: Path
    profile: str
    gpusq: str = Field(description="The release that wrote it.")
    files: int
    bytes: int
    signature: str = Field(description="none, there (not checked) or of the given key.")
    engines: tuple[EngineCheck, ...]

    def to_text(self) -> str:
        """The check for the terminal."""
        lines = [
            f"{self.bundle}: whole, {self.files} files, {self.bytes:,} bytes",
            f"  for {self.profile}, by gpusq {self.gpusq}",
            f"  signature: {self.signature}",
        ]
        for engine in self.engines:
            said = "fits this host" if engine.fits else f"not for this host: {engine.why}"
            lines.append(f"  {engine.file} ({engine.runtime} {engine.runtime_version}, {engine.target}): {said}")
        return "\n".join(lines if self.engines else [*lines, "  it has no engine"])


def verify_bundle(bundle: str | Path, public_key: Path | None = None) -> BundleCheck:
    """Check the bundle in the folder `bundle`.

    Args:
        bundle: the folder.
        public_key: a PEM file; the bundle must be signed by its owner.

    Raises:
        GpusqError: it is no bundle, a newer gpusq wrote it, a file is missing, changed or not in the manifest, an
            engine is not one for the bundle's device, or the signature is not there or another's.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    if public_key is not None:
        check_signature(bundle, public_key)
    check_files(bundle, manifest)
    _refuse_strangers(bundle, manifest)
    return BundleCheck(
        bundle=bundle,
        profile=manifest.profile,
        gpusq=manifest.gpusq,
        files=len(manifest.files),
        bytes=sum(entry.bytes for entry in manifest.files.values()),
        signature=_signature(bundle, public_key),
        engines=tuple(_check(bundle, manifest, engine) for engine in manifest.engines),
    )


def _refuse_strangers(bundle: Path, manifest: Manifest) -> None:
    for name in hash_files(bundle):
        if name not in manifest.files:
            raise GpusqError(f"{bundle / name} is not in the manifest", hint="remove it, or convert again")


def _check(bundle: Path, manifest: Manifest, engine: Engine) -> EngineCheck:
    if engine.file not in manifest.files:
        raise GpusqError(f"{bundle / engine.file} is an engine without a hash", hint="convert the checkpoint again")
    if why := why_not_its_device(engine, manifest.device_profile):
        raise GpusqError(f"{bundle / engine.file} is not of this bundle: {why}", hint="convert the checkpoint again")
    why = unfit(engine, manifest)
    return EngineCheck(
        file=engine.file,
        runtime=engine.runtime,
        runtime_version=engine.runtime_version,
        target=engine.target,
        fits=not why,
        why=why,
    )


def _signature(bundle: Path, public_key: Path | None) -> str:
    if public_key is not None:
        return f"of the key in {public_key}"
    return "there, not checked: give --public-key" if (bundle / SIGNATURE_NAME).is_file() else "none"
