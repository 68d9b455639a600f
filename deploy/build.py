"""Build the engine of a bundle: onnxruntime's optimized model for a CPU, TensorRT's engine for a GPU.

For a GPU there are two engines, and they are not the same thing:

* TensorRT-RTX compiles ahead of time for the profile's compute capability, or its nearest relative, on any machine.
  That proves types and fusion, the plan; it is no timing, and it ignores sparsity.
* TensorRT builds on the device itself. Where this host is not that device, the bundle says so, and `gpusq build BUNDLE`
  on the device finishes it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy import onnxruntime_api, tensorrt_api
from deploy.ahead_of_time import compile_ahead
from deploy.environment import gpus
from deploy.manifest import Engine, Missing, Plan
from deploy.sparsity_log import read_sparse_choice
from profiles.device import AheadOfTime, Device
from profiles.errors import GpusqError

MODEL_FILE = "model.onnx"
DEVICE_ENGINE = "TensorRT engine"


@dataclass(frozen=True)
class BuildResult:
    """The engines that were built, what could not be built here, and the plan of the first."""

    engines: tuple[Engine, ...]
    missing: tuple[Missing, ...]
    plan: Plan | None


def build(bundle: Path, device: Device, *, name: str) -> BuildResult:
    """Build every engine for `device` that this host can, into the folder `bundle`, which holds `model.onnx`.

    Args:
        bundle: the folder.
        device: the profile.
        name: the bundle's name in the command that the user is told to run on the device.
    """
    if device.runtime == "onnxruntime":
        return _build_for_cpu(bundle)
    ahead, plan_ = _build_ahead_of_time(bundle, device)
    on_device, missing = _build_on_device(bundle, device, name)
    if ahead is None:
        missing = (*missing, _missing_ahead_of_time(device, name))
    return BuildResult(tuple(engine for engine in (ahead, on_device) if engine), missing, plan_)


def build_on_device(bundle: Path, device: Device) -> Engine:
    """Build TensorRT's engine on the GPU of this host.

    Raises:
        GpusqError: TensorRT is not installed, or the GPU is not the profile's.
    """
    engine, missing = _build_on_device(bundle, device, bundle.name)
    if engine is None:
        raise GpusqError(
            f"the {missing[0].what} cannot be built here: {missing[0].why}",
            hint=f"copy the bundle to the device and run `{missing[0].how}` there",
        )
    return engine


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


def _build_for_cpu(bundle: Path) -> BuildResult:
    path = bundle / "engine.onnx"
    onnxruntime_api.open_session(bundle / MODEL_FILE, optimized_path=path)
    engine = Engine(
        file=path.name,
        runtime="onnxruntime",
        runtime_version=onnxruntime_api.runtime_version(),
        target="cpu",
        nearest=False,
        note="optimized for the processor of this host",
    )
    return BuildResult((engine,), (), onnxruntime_api.read_plan(ir.load(path), ir.load(bundle / MODEL_FILE)))


def _build_ahead_of_time(bundle: Path, device: Device) -> tuple[Engine | None, Plan | None]:
    target = device.ahead_of_time
    if target is None or not tensorrt_api.has_api("tensorrt-rtx"):
        return None, None
    compiled = compile_ahead(bundle / MODEL_FILE, target)
    built = compiled.built
    path = bundle / f"engine.{target.compute_capability.lower()}.rtx"
    path.write_bytes(built.engine)
    engine = Engine(
        file=path.name,
        runtime=built.runtime,
        runtime_version=built.runtime_version,
        target=target.compute_capability,
        nearest=target.nearest,
        note=_note(target),
    )
    return engine, compiled.plan


def _note(target: AheadOfTime) -> str:
    nearest = (
        f"{target.compute_capability} is the device's nearest relative that the compiler knows; "
        if target.nearest
        else ""
    )
    return f"{nearest}proves types and fusion, is no timing and uses no sparse kernels"


def _build_on_device(bundle: Path, device: Device, name: str) -> tuple[Engine | None, tuple[Missing, ...]]:
    why = _why_not_here(device)
    if why:
        return None, (Missing(what=DEVICE_ENGINE, why=why, how=f"gpusq build {name}"),)
    # nvidia-smi, which told the GPU's name, counts by PCI bus; CUDA by default does not.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    built = tensorrt_api.build_engine(bundle / MODEL_FILE, "tensorrt")
    path = bundle / "engine.tensorrt"
    path.write_bytes(built.engine)
    (bundle / "engine.tensorrt.log").write_text("\n".join(built.log) + "\n", encoding="utf-8")
    sparse = read_sparse_choice(built.log)
    gpu = gpus()[0]
    engine = Engine(
        file=path.name,
        runtime=built.runtime,
        runtime_version=built.runtime_version,
        target=f"SM{gpu.compute_capability.replace('.', '')}",
        nearest=False,
        note="built on the device",
        built_on=f"{gpu.name}, driver or Jetson Linux {gpu.driver or 'unknown'}",
        sparse_eligible=sparse.eligible,
        sparse_chosen=sparse.chosen,
    )
    return engine, ()


def _why_not_here(device: Device) -> str:
    here = gpus()
    if not here:
        return f"it is built on {device.title}, and this host has no NVIDIA GPU"
    first = here[0]
    named = device.gpu_name is None or device.is_called(first.name)
    if first.compute_capability != device.compute_capability or not named:
        return f"it is built on {device.title}, and the GPU of this host is {first.name}"
    return "" if tensorrt_api.has_api("tensorrt") else "the Python package tensorrt is not installed here"


def _missing_ahead_of_time(device: Device, name: str) -> Missing:
    if device.ahead_of_time is None:
        why = "TensorRT-RTX cannot compile for this device on another machine"
        return Missing(what="compiled plan", why=why, how=f"gpusq build {name}")
    return Missing(what="compiled plan", why="tensorrt-rtx is not installed here", how="pip install tensorrt-rtx")
