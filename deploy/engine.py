"""Run what a bundle holds, whatever made it: numpy arrays in, numpy arrays out, the same for all runtimes.

    engine = open_engine(Path("dist/a100"))
    logits = engine.infer({"images": images})["logits"]

An engine is code that runs in this process. It is loaded if it is the file that the manifest names, by its SHA-256, if
this host is the device that it was built on, and if the runtime is the version that built it; else the error says
which of the three it is, and how to build it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from deploy import environment, tensorrt_api
from deploy.bundle import hash_file
from deploy.cuda import Array
from deploy.engine_fit import why_not_its_device
from deploy.manifest import Engine as Entry
from deploy.manifest import Manifest, read_manifest
from profiles.errors import GpusqError


class Engine(Protocol):
    """A loaded engine."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one request: every input by name, every output by name."""

    def close(self) -> None:
        """Give back what it holds."""


class OnnxRuntimeEngine:
    """onnxruntime on the CPU."""

    def __init__(self, path: Path, *, optimized: bool = True) -> None:
        """Open the ONNX file at `path`; not `optimized`, each node is computed as it is written."""
        from deploy.onnxruntime_api import open_session

        self._session: Any = open_session(path, optimize=optimized)
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Answer one request; each array is cast to the model's type."""
        from calibration.feed import fit

        return dict(zip(self.outputs, self._session.run(None, fit(self._session.get_inputs(), inputs)), strict=True))

    def close(self) -> None:
        """The session goes with its last reference."""
        self._session = None


def open_engine(bundle: Path, runtime: str | None = None) -> Engine:
    """Load the engine of `bundle` that `runtime` made, or the last one in it, which is TensorRT's where there is one.

    Raises:
        GpusqError: there is no such engine, or hash, device or version do not fit.
    """
    entry, path = checked_engine(bundle, runtime)
    if entry.runtime == "onnxruntime":
        return OnnxRuntimeEngine(path)
    from deploy.tensorrt_engine import TensorRtEngine

    return TensorRtEngine(path.read_bytes(), entry.runtime)


def checked_engine(bundle: Path, runtime: str | None = None) -> tuple[Entry, Path]:
    """The engine that `open_engine` loads, with its file, once everything that it asks for holds.

    Raises:
        GpusqError: as `open_engine` does.
    """
    manifest = read_manifest(bundle)
    entries = [entry for entry in manifest.engines if runtime in (None, entry.runtime)]
    if not entries:
        raise GpusqError(f"{bundle} has no engine of {runtime or 'any runtime'}", hint=f"gpusq build {bundle}")
    entry = entries[-1]
    path = bundle / entry.file
    if entry.file not in manifest.files or not path.is_file() or hash_file(path) != manifest.files[entry.file]:
        raise GpusqError(f"{path} is not the file that the manifest names", hint="engines are code: convert again")
    why = why_not_its_device(entry, manifest.device_profile) or unfit(entry, manifest)
    if why:
        raise GpusqError(f"{path} is not for this host: {why}", hint=f"build it here: gpusq build {bundle}")
    return entry, path


def unfit(entry: Entry, manifest: Manifest) -> str:
    """Why an engine must not be loaded on this host; empty if it may."""
    version = _version(entry.runtime)
    if version is None:
        return f"{entry.runtime} is not installed"
    if version != entry.runtime_version:
        return f"{entry.runtime} {entry.runtime_version} built it, and here is {version}"
    if entry.runtime == "onnxruntime":
        built, here = manifest.host.get("processor", ""), environment.processor()
        return "" if built == here else f"it was optimized on {built}, and this is {here}"
    gpus = environment.gpus()
    if not gpus:
        return "it has no NVIDIA GPU"
    capability = f"SM{gpus[0].compute_capability.replace('.', '')}"
    if capability != entry.target:
        return f"it is for {entry.target}, and {gpus[0].name} is {capability}"
    if entry.built_on is not None and not entry.built_on.startswith(f"{gpus[0].name},"):
        return f"it was built on {entry.built_on}, and this is {gpus[0].name}"
    return ""


def _version(runtime: str) -> str | None:
    if runtime == "onnxruntime":
        return environment.versions().get("onnxruntime") or environment.versions().get("onnxruntime-gpu")
    return tensorrt_api.versions().get(runtime)
