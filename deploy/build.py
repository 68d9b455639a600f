"""Build the engine of a bundle: onnxruntime's optimized model for a CPU, TensorRT's engine for a GPU.

For a GPU there are two engines, and they are not the same thing:

* TensorRT-RTX compiles ahead of time for the profile's compute capability, or its nearest relative, on any machine.
  That proves types and fusion, the plan; it is no timing, and it ignores sparsity.
* TensorRT builds on the device itself. Where this host is not that device, the bundle says so, and `gpusq build BUNDLE`
  on the device finishes it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from deploy import onnxruntime_api, tensorrt_api
from deploy.ahead_of_time import compile_ahead
from deploy.build_log import read_build_log
from deploy.build_options import BuildOptions, option_name
from deploy.environment import Gpu, cuda_release, gpus
from deploy.inspector import read_inspector
from deploy.manifest import Engine, Missing, Plan
from deploy.plan import plan_of
from deploy.tensorrt_api import Built
from deploy.timing_cache import default_folder, timing_cache_file
from deploy.trtexec import build_with_trtexec
from profiles.device import AheadOfTime, Device
from profiles.errors import GpusqError

MODEL_FILE = "model.onnx"
DEVICE_ENGINE = "TensorRT engine"
Via = Literal["python", "trtexec"]


@dataclass(frozen=True)
class BuildResult:
    """The engines that were built, what could not be built here, and the plan of the first."""

    engines: tuple[Engine, ...]
    missing: tuple[Missing, ...]
    plan: Plan | None


def build(
    bundle: Path,
    device: Device,
    *,
    name: str | Sequence[str],
    options: BuildOptions | None = None,
    model: Path | None = None,
    via: Via = "python",
) -> BuildResult:
    """Build every engine for `device` that this host can, into the folder `bundle`.

    Args:
        bundle: the folder.
        device: the profile.
        name: what is to be built, in the command that the user is told to run on the device.
        options: what is asked of the builders.
        model: the ONNX file; by default `model.onnx` in the folder.
        via: what builds TensorRT's engine on the device: its Python package, or trtexec.

    Raises:
        GpusqError: the model cannot be built, or a builder at hand lacks an option.
    """
    options, model = options or BuildOptions(), model or bundle / MODEL_FILE
    if device.runtime == "onnxruntime":
        return _build_for_cpu(bundle, model, options)
    words = (name,) if isinstance(name, str) else tuple(name)
    job = _Build(model, bundle, device, words, options, via)
    ahead, plan_ = _build_ahead_of_time(job)
    on_device, missing, read_back = _build_on_device(job)
    if ahead is None:
        missing = (*missing, _missing_ahead_of_time(job))
    return BuildResult(tuple(engine for engine in (ahead, on_device) if engine), missing, read_back or plan_)


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
    job = _Build(bundle / MODEL_FILE, bundle, device, (bundle.name,), options or BuildOptions(), via)
    engine, missing, plan_ = _build_on_device(job)
    if engine is None:
        raise GpusqError(
            f"the {missing[0].what} cannot be built here: {missing[0].why}",
            hint=f"copy the bundle to the device and run `{missing[0].how}` there",
        )
    return engine, plan_


def summary(result: BuildResult) -> str:
    """One line for the terminal."""
    built = [
        f"{engine.runtime} for {engine.target}{' (nearest)' if engine.nearest else ''}" for engine in result.engines
    ]
    lacking = [f"{missing.what} missing: {missing.why}" for missing in result.missing]
    return "; ".join([*built, *lacking])


def plan_summary(found: Plan) -> str:
    """One line for the terminal."""
    fused = sum(attention.fused for attention in found.attentions)
    blocks = found.kernels_per_block.values()
    per_block = f", at most {max(blocks)} a block" if blocks else ""
    return (
        f"{len(found.kernels)} kernels{per_block}; "
        f"{found.linear_gemms_int8} of {found.linear_gemms} linear GEMMs INT8; "
        f"{fused} of {len(found.attentions)} attentions fused"
    )


@dataclass(frozen=True)
class _Build:
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


def _build_for_cpu(folder: Path, model: Path, options: BuildOptions) -> BuildResult:
    for option in options.asked():
        raise GpusqError(f"onnxruntime has no {option_name(option)}", hint="the option is for profiles of GPUs")
    path = folder / "engine.onnx"
    onnxruntime_api.open_session(model, optimized_path=path)
    engine = Engine(
        file=path.name,
        runtime="onnxruntime",
        runtime_version=onnxruntime_api.runtime_version(),
        target="cpu",
        nearest=False,
        note="optimized for the processor of this host",
    )
    return BuildResult((engine,), (), onnxruntime_api.read_plan(ir.load(path), ir.load(model)))


def _build_ahead_of_time(job: _Build) -> tuple[Engine | None, Plan | None]:
    target = job.device.ahead_of_time
    if target is None or not tensorrt_api.has_api("tensorrt-rtx"):
        return None, None
    options, rest = job.options.ahead_of_time()
    compiled = compile_ahead(job.model, target, options=options)
    built = compiled.built
    path = job.folder / f"engine.{target.compute_capability.lower()}.rtx"
    path.write_bytes(built.engine)
    engine = Engine(
        file=path.name,
        runtime=built.runtime,
        runtime_version=built.runtime_version,
        target=target.compute_capability,
        nearest=target.nearest,
        note=_note(target, rest),
        options=_told(options),
    )
    return engine, compiled.plan


def _note(target: AheadOfTime, rest: Sequence[str]) -> str:
    nearest = (
        f"{target.compute_capability} is the device's nearest relative that the compiler knows; "
        if target.nearest
        else ""
    )
    left = f"; {', '.join(rest)}: for TensorRT on the device alone" if rest else ""
    return f"{nearest}proves types and fusion, is no timing and uses no sparse kernels{left}"


def _told(options: BuildOptions) -> dict[str, Any]:
    """The options that are not the default, as JSON has them."""
    told: dict[str, Any] = json.loads(options.canonical_json())
    return {name: told[name] for name in options.asked()}


def _build_on_device(job: _Build) -> tuple[Engine | None, tuple[Missing, ...], Plan | None]:
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


def _built_here(job: _Build, gpu: Gpu) -> Built:
    cuda = cuda_release() or "unknown"
    if job.via == "trtexec":
        timings = timing_cache_file(default_folder(), gpu=gpu.name, cuda=cuda, version="of trtexec")
        return build_with_trtexec(job.model, job.folder, job.options, timings)
    version = tensorrt_api.versions().get("tensorrt", "unknown")
    timings = timing_cache_file(default_folder(), gpu=gpu.name, cuda=cuda, version=version)
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
        options=_told(options),
    )


def _read_back(built: Built, job: _Build) -> Plan | None:
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


def _missing_ahead_of_time(job: _Build) -> Missing:
    if job.device.ahead_of_time is None:
        why = "TensorRT-RTX cannot compile for this device on another machine"
        return Missing(what="compiled plan", why=why, how=job.command)
    return Missing(what="compiled plan", why="tensorrt-rtx is not installed here", how="pip install tensorrt-rtx")
