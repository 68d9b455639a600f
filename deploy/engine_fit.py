"""Does an engine fit this host? Its runtime's version, its compute capability and its device must be those it has.

An engine is code: it is loaded only when its hash is the manifest's, and TensorRT takes one only from its own exact
version and for the GPU that it was built on.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from deploy import environment, onnxruntime_api, tensorrt_api
from deploy.bundle import hash_file
from deploy.manifest import Engine, Manifest
from profiles.device import Device
from profiles.errors import GpusqError

_SM = re.compile(r"SM(\d+)(\d)")


def why_not_here(engine: Engine) -> str:
    """Why `engine` cannot run on this host; empty where it fits."""
    version = _version_here(engine.runtime)
    if version is None:
        return f"{engine.runtime} is not installed here"
    if version != engine.runtime_version:
        return f"it was built by {engine.runtime} {engine.runtime_version}, and this host has {version}"
    return _why_not_this_gpu(engine)


def why_not_its_device(engine: Engine, device: Device) -> str:
    """Why `engine` cannot be one for `device`; empty where it can."""
    if engine.runtime == "onnxruntime":
        return "" if device.runtime == "onnxruntime" else f"it is for a processor, and {device.name} is a GPU"
    ahead = device.ahead_of_time
    known = {f"SM{(device.compute_capability or '').replace('.', '')}"}
    if engine.runtime == "tensorrt-rtx" and ahead is not None:
        known.add(ahead.compute_capability)
    return "" if engine.target in known else f"it is for {engine.target}, and {device.name} takes {', '.join(known)}"


def loadable(bundle: Path, manifest: Manifest, engine: Engine) -> Path:
    """The file of `engine` in `bundle`, when it is safe and sensible to load it here.

    Raises:
        GpusqError: the manifest does not name the file, its hash is another, or it fits another device or version.
    """
    path = bundle / engine.file
    entry = manifest.files.get(engine.file)
    if engine not in manifest.engines or entry is None:
        raise GpusqError(f"{path} is not an engine of this bundle", hint="an engine is code: build it from the model")
    if not path.is_file() or hash_file(path) != entry:
        raise GpusqError(f"{path} is not the file that the manifest names", hint="convert the checkpoint again")
    if why := why_not_its_device(engine, manifest.device_profile) or why_not_here(engine):
        raise GpusqError(f"{path} does not run here: {why}", hint=f"build it here: gpusq build {bundle}")
    return path


def _version_here(runtime: str) -> str | None:
    if runtime == "onnxruntime":
        try:
            return onnxruntime_api.runtime_version()
        except ImportError:
            return None
    return str(tensorrt_api.import_api(runtime).__version__) if tensorrt_api.has_api(runtime) else None


def _why_not_this_gpu(engine: Engine) -> str:
    match = _SM.fullmatch(engine.target)
    if match is None:
        return ""
    here = environment.gpus()
    if not here:
        return f"it is for {engine.target}, and this host ({platform.machine()}) has no NVIDIA GPU"
    capability = here[0].compute_capability
    if capability != f"{match[1]}.{match[2]}":
        return f"it is for {engine.target}, and the GPU of this host is {here[0].name} ({capability})"
    if engine.built_on is not None and not engine.built_on.startswith(f"{here[0].name},"):
        return f"it was built on {engine.built_on}, and the GPU of this host is {here[0].name}"
    return ""
