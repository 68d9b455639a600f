"""The parts list of a bundle, as CycloneDX: the student, the files that were made, and the packages that made them."""

from __future__ import annotations

import importlib.util
import uuid
from datetime import datetime
from typing import Any

from deploy.manifest import FileEntry, Manifest
from profiles.errors import GpusqError

FILE_NAME = "sbom.cdx.json"
_NAMESPACE = uuid.UUID("5f0a3b1e-6c1d-5e0b-9c57-0d4c2f6f7a11")


def sbom(manifest: Manifest, files: dict[str, FileEntry]) -> str:
    """The parts list of the bundle that `manifest` describes, CycloneDX 1.6 as JSON; the same for the same bundle.

    Args:
        manifest: of the bundle.
        files: what it holds.

    Raises:
        GpusqError: the library is not installed.
    """
    require_library()
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    content = "".join(f"{entry.sha256} {name}\n" for name, entry in sorted(files.items()))
    bom = Bom(serial_number=uuid.uuid5(_NAMESPACE, content + manifest.created), version=1)
    bom.metadata.timestamp = datetime.fromisoformat(manifest.created)
    bom.metadata.component = _component("machine-learning-model", f"{manifest.student.model} for {manifest.profile}")
    bom.components.add(_component("machine-learning-model", manifest.student.file, sha256=manifest.student.sha256))
    for name, entry in files.items():
        bom.components.add(_component("file", name, sha256=entry.sha256))
    for name, version in manifest.versions.items():
        bom.components.add(_package(name, version))
    bom.register_dependency(bom.metadata.component, bom.components)
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def require_library() -> None:
    """Raise GpusqError where cyclonedx-python-lib is not installed."""
    if importlib.util.find_spec("cyclonedx") is None:
        raise GpusqError("a parts list needs cyclonedx-python-lib", hint="pip install 'gpusq[sbom]'")


def _package(name: str, version: str) -> Any:
    from packageurl import PackageURL

    if name == "python":
        return _component("platform", name, version=version)
    return _component("library", name, version=version, purl=PackageURL("pypi", None, name, version))


def _component(kind: str, name: str, *, sha256: str | None = None, **more: Any) -> Any:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else None
    return Component(name=name, type=ComponentType(kind), bom_ref=f"{kind}:{name}", hashes=hashes, **more)
