"""The stages of a conversion that are kept in the cache, and everything that decides about each.

| stage | makes | decided by |
|---|---|---|
| surgery | `model.onnx`, and what its passes did | checkpoint, samples, every option, the profile, the packages |
| build | the engines and the plan | `model.onnx`, the profile's target, the host's GPU and processor, the runtimes |
| verify | the verification | `model.onnx`, checkpoint, samples, the runtime, the host's processor |

Loading and measuring are always done: a load finds what the user got wrong, and a measurement is of now. So are
surgery and verify where the architecture is the user's own code, whose changes no hash here would show.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from calibration.costly_layers import Found
from calibration.methods import Method
from calibration.samples import Samples
from deploy import environment, tensorrt_api
from deploy.bundle import hash_checkpoint, hash_file
from deploy.cache_key import Key, code_digest
from deploy.manifest import Failed, Layer, Sizes
from exporters.passes.outcome import Outcome
from profiles.device import Device
from profiles.record import Record

if TYPE_CHECKING:
    from deploy.job import Job

# What reads checkpoints, traces modules, measures ranges or compiles.
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy", "safetensors", "timm", "torchvision", "transformers",
             "ultralytics", "torchao", "brevitas", "nvidia-modelopt", "pillow", "tokenizers")  # fmt: skip
_FIRST = 4
# What counts by its hash, in another stage, or not at all.
_ELSEWHERE = {"checkpoint", "data", "scales_file", "baseline", "out", "build", "required", "progress", "cache",
              "partial", "parts_list"}  # fmt: skip
_HOST = ("machine", "processor", "gpu", "driver", "cuda toolkit", "jetson linux")  # what a builder's choice depends on
_LIBRARIES = ("timm:", "torchvision:", "hf:")


class Prepared(Record):
    """What the surgery made of a student for one device, beside `model.onnx`."""

    passes: tuple[Outcome, ...]
    layers: tuple[Layer, ...]
    sizes: Sizes
    opset: int
    ranges_by: str | None
    way: str
    failed: tuple[Failed, ...]
    mixed_precision: Found | None
    chosen: dict[str, Method] = Field(
        description="Of the ranges of tensors, where it was chosen: the whole job's from then on."
    )


def surgery_key(job: Job, device: Device) -> Key:
    """The key of the student's graph for `device`."""
    return Key(
        "surgery",
        {
            **_asked(job),
            "checkpoint": job.source.sha256,
            "samples": None if job.data is None else _samples(job.samples),
            "scales": None if job.scales_file is None else hash_file(job.scales_file).sha256,
            "chosen method": _json(job.ranging.chosen),
            "profile": device.model_dump(mode="json"),
            **_code(),
            "versions": _versions(*_PACKAGES, "onnxruntime"),
            "processor": environment.processor(),
        },
    )


def build_key(model: Path, device: Device, options: Any = None) -> Key:
    """The key of the engines of the ONNX file `model` for `device`.

    Args:
        model: the file; its external data counts.
        device: the profile.
        options: of the build, a dataclass; every field counts.
    """
    host = environment.host()
    return Key(
        "build",
        {
            "model": hash_checkpoint(model),
            "options": None if options is None else _plain(options),
            "device": device.model_dump(
                mode="json", include={"name", "title", "runtime", "compute_capability", "gpu_name", "ahead_of_time"}
            ),
            "host": {name: host[name] for name in _HOST},
            **_code(),
            "versions": {**_versions("onnx", "onnx-ir", "onnxruntime"), **tensorrt_api.versions()},
        },
    )


def verify_key(job: Job, model: Path) -> Key:
    """The key of the comparison of the ONNX file `model` with the student."""
    return Key(
        "verify",
        {
            "model": hash_checkpoint(model),
            "checkpoint": job.source.sha256,
            "options": _plain(job.options),
            "scales kept": job.quantized,
            "samples": {"source": job.samples.source, **_samples(job.samples)},
            "batch": job.fixed_batch,
            **_code(),
            "versions": _versions(*_PACKAGES, "onnxruntime"),
            "processor": environment.processor(),
        },
    )


def own_code(job: Job) -> bool:
    """Whether the student's architecture is code that no hash of a key covers."""
    model = job.options.model
    return job.options.trust_code or (model is not None and not model.startswith(_LIBRARIES))


def _asked(job: Job) -> dict[str, Any]:
    """Every option of a job, but for files, which count by their hash, and what no graph depends on."""
    asked = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.init}
    return {name.replace("_", " "): _json(value) for name, value in asked.items() if name not in _ELSEWHERE}


def _samples(samples: Samples) -> dict[str, str | None]:
    """The hash of what was read, and that of the first rows as the model gets them: a tokenizer or an image
    library may make something else of the same files.
    """
    first = hashlib.sha256()
    for name, rows in sorted(samples.inputs.items()):
        first.update(name.encode())
        first.update(np.ascontiguousarray(rows[np.arange(min(_FIRST, len(rows)))]).tobytes())
    labels = None if samples.labels is None else hashlib.sha256(samples.labels.tobytes()).hexdigest()
    return {"sha256": samples.sha256, "labels": labels, "first rows": first.hexdigest()}


def _code() -> dict[str, str]:
    return {"gpusq code": code_digest()}


def _plain(record: Any) -> dict[str, Any]:
    """A dataclass's fields as JSON has them."""
    return {field.name: _json(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain(value)
    if isinstance(value, dict):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
