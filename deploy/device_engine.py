"""Build TensorRT's engine on the device itself, and read back what came of it: its log, its inspector, its plan.

engine.tensorrt               the engine
engine.tensorrt.log           everything that the builder said
engine.tensorrt.layers.json   what the inspector says of its layers
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from deploy import tensorrt_api
from deploy.build_log import read_build_log
from deploy.build_options import BuildOptions
from deploy.environment import Gpu, cuda_release, gpus
from deploy.inspector import read_inspector
from deploy.manifest import MODEL_FILE, Engine, Missing, Plan
from deploy.plan import plan_of
from deploy.tensorrt_api import Built
from deploy.timing_cache import default_folder, timing_cache_file
from deploy.trtexec import build_with_trtexec, installed_version
from profiles.device import Device
from profiles.errors import GpusqError

DEVICE_ENGINE = "TensorRT engine"
Via = Literal["python", "trtexec"]


@dataclass(frozen=True)
class BuildJob:
    """What is built, and where the engines go."""

    model: Path
    folder: Path
    device: Device
    name: tuple[str, ...]
    options: BuildOptions
    via: Via = "python"

    @property
    def command(self) -> str:
        """What builds the same on the device."""
        return shlex.join(["gpusq", "build", *self.name, *self.options.flags()])


def build_on_device(
    bundle: Path, device: Device, options: BuildOptions | None = None, *, via: Via = "python"
) -> tuple[Engine, Plan | None]:
    """Build TensorRT's engine on the GPU of this host, and read its plan back.

    Args:
        bundle: the folder, which holds `model.onnx`.
        device: the profile.
        options: what is asked of the builder.
        via: what builds it.

    Raises:
        GpusqError: TensorRT is not installed or lacks an option, or the GPU is not the profile's.
    """
    job = BuildJob(bundle / MODEL_FILE, bundle, device, (bundle.name,), options or BuildOptions(), via)
    engine, missing, plan_ = build_here(job)
    if engine is None:
        raise GpusqError(
            f"the {missing[0].what} cannot be built here: {missing[0].why}",
            hint=f"copy the bundle to the device and run `{missing[0].how}` there",
        )
    return engine, plan_


def build_here(job: BuildJob) -> tuple[Engine | None, tuple[Missing, ...], Plan | None]:
    """The engine and its plan; where this host is not the device, what is missing and the command for it."""
    why = _why_not_here(job.device, job.via)
    if why:
        return None, (Missing(what=DEVICE_ENGINE, why=why, how=job.command),), None
    # nvidia-smi, which told the GPU's name, counts by PCI bus; CUDA by default does not.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    gpu = gpus()[0]
    built = _built_here(job, gpu)
    path = job.folder / "engine.tensorrt"
    path.write_bytes(built.engine)
    (job.folder / "engine.tensorrt.log").write_text("\n".join(built.log) + "\n", encoding="utf-8")
    return _device_engine(path, built, gpu, job.options), (), _read_back(built, job)


def _built_here(job: BuildJob, gpu: Gpu) -> Built:
    by_trtexec = job.via == "trtexec"
    version = installed_version() if by_trtexec else tensorrt_api.versions().get("tensorrt", "unknown")
    timings = timing_cache_file(default_folder(), gpu=gpu.name, cuda=cuda_release() or "unknown", version=version)
    if by_trtexec:
        return build_with_trtexec(job.model, job.folder, job.options, timings)
    return tensorrt_api.build_engine(job.model, "tensorrt", options=job.options, timing_cache=timings)


def _device_engine(path: Path, built: Built, gpu: Gpu, options: BuildOptions) -> Engine:
    said = read_build_log(built.log)
    return Engine(
        file=path.name,
        runtime=built.runtime,
        runtime_version=built.runtime_version,
        target=f"SM{gpu.compute_capability.replace('.', '')}",
        nearest=False,
        note="built on the device",
        built_on=f"{gpu.name}, driver or Jetson Linux {gpu.driver or 'unknown'}",
        sparse_eligible=said.sparse.eligible,
        sparse_chosen=said.sparse.chosen,
        dla_fallbacks=said.dla_fallbacks,
        tactics_skipped=said.tactics_skipped,
        options=told(options),
    )


def _read_back(built: Built, job: BuildJob) -> Plan | None:
    """The plan of an engine that TensorRT built, from its inspector; None where it says nothing."""
    if built.layers is None:
        return None
    (job.folder / "engine.tensorrt.layers.json").write_text(built.layers, encoding="utf-8")
    return plan_of(
        read_inspector(built.layers),
        ir.load(job.model),
        source=f"TensorRT {built.runtime_version}, inspector",
        target=f"SM{(job.device.compute_capability or '').replace('.', '')}",
        log=built.log,
    )


def _why_not_here(device: Device, via: Via) -> str:
    here = gpus()
    if not here:
        return f"it is built on {device.title}, and this host has no NVIDIA GPU"
    first = here[0]
    named = device.gpu_name is None or device.is_called(first.name)
    if first.compute_capability != device.compute_capability or not named:
        return f"it is built on {device.title}, and the GPU of this host is {first.name}"
    if via == "trtexec":
        return "" if shutil.which("trtexec") else "there is no trtexec on PATH"
    return "" if tensorrt_api.has_api("tensorrt") else "the Python package tensorrt is not installed here"


def told(options: BuildOptions) -> dict[str, Any]:
    """The options that are not the default, as JSON has them."""
    told: dict[str, Any] = json.loads(options.canonical_json())
    return {name: told[name] for name in options.asked()}
