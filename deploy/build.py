"""Build the engine of a bundle: onnxruntime's optimized model for a CPU, TensorRT's engine for a GPU.

For a GPU there are two engines, and they are not the same thing:

* TensorRT-RTX compiles ahead of time for the profile's compute capability, or its nearest relative, on any machine.
  That proves types and fusion, the plan; it is no timing, and it ignores sparsity.
* TensorRT builds on the device itself. Where this host is not that device, the bundle says so, and `gpusq build BUNDLE`
  on the device finishes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from deploy import onnxruntime_api, tensorrt_api
from deploy.ahead_of_time import compile_ahead
from deploy.build_options import BuildOptions, option_name
from deploy.device_engine import BuildJob, Via, build_here, told
from deploy.gates import not_judged
from deploy.manifest import MODEL_FILE, Engine, Missing, Plan
from profiles.device import AheadOfTime, Device
from profiles.errors import GpusqError


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
    job = BuildJob(model, bundle, device, words, options, via)
    ahead, plan_ = _build_ahead_of_time(job)
    on_device, missing, read_back = build_here(job)
    if ahead is None:
        missing = (*missing, _missing_ahead_of_time(job))
    return BuildResult(tuple(engine for engine in (ahead, on_device) if engine), missing, read_back or plan_)


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
        f"{fused} of {len(found.attentions)} attentions fused" + "".join(f"; {left}" for left in not_judged(found))
    )


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


def _build_ahead_of_time(job: BuildJob) -> tuple[Engine | None, Plan | None]:
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
        options=told(options),
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


def _missing_ahead_of_time(job: BuildJob) -> Missing:
    if job.device.ahead_of_time is None:
        why = "TensorRT-RTX cannot compile for this device on another machine"
        return Missing(what="compiled plan", why=why, how=job.command)
    return Missing(what="compiled plan", why="tensorrt-rtx is not installed here", how="pip install tensorrt-rtx")
