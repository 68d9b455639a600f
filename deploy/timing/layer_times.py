"""Where the time of a call goes: each kernel's, with the modules that it computes.

onnxruntime and TensorRT slow down while they tell it, so these calls are made apart from those that are timed, and the
times are to be read as shares of their sum. A kernel of onnxruntime is a node of the optimized graph, and its module is
in its name. TensorRT's modules are those of the bundle's plan, where a kernel has the name that it has there.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploy.manifest import read_manifest
from deploy.onnxruntime_api import open_session
from deploy.timing.engine import CpuEngine, Opened
from deploy.timing.gpu_engine import GpuEngine
from deploy.timing.results import LayerTime

CALLS = 30
_WARM_UP = 10
_US_PER_MS = 1e3
_SUFFIX = "_kernel_time"  # of a node's event in a profile of onnxruntime


def layer_times(engine: Opened, calls: int = CALLS) -> tuple[LayerTime, ...]:
    """The median time of each kernel of `engine` in `calls` calls, the slowest first."""
    if isinstance(engine, GpuEngine):
        return _ranked(engine.engine.layer_times(engine.request, calls), _modules_of_plan(engine))
    assert isinstance(engine, CpuEngine)
    return _of_onnxruntime(engine, calls)


def _of_onnxruntime(engine: CpuEngine, calls: int) -> tuple[LayerTime, ...]:
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(engine.model.path, profile=Path(folder) / "profile")
        profiled = CpuEngine(engine.model, session, engine.feed)
        for _ in range(_WARM_UP + calls):
            profiled.call()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times, names = defaultdict[str, list[float]](list), dict[str, str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            index, name = event["args"]["node_index"], event["name"].removesuffix(_SUFFIX)
            times[index].append(event["dur"] / _US_PER_MS)
            names[index] = f"{event['args']['op_name']} {name}"
    modules = {index: _module(name) for index, name in names.items()}
    kept = {index: found[_WARM_UP:] for index, found in times.items()}
    return _ranked(kept, modules, names)


def _module(name: str) -> tuple[str, ...]:
    module = name.partition(" ")[2].rpartition("/")[0]
    return (module,) if module else ()


def _modules_of_plan(engine: GpuEngine) -> dict[str, tuple[str, ...]]:
    assert engine.model.bundle is not None
    plan = read_manifest(engine.model.bundle).plan
    return {} if plan is None else {kernel.name: kernel.modules for kernel in plan.kernels}


def _ranked(
    times: Mapping[str, Sequence[float]],
    modules: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str] | None = None,
) -> tuple[LayerTime, ...]:
    medians = {key: float(np.median(found)) for key, found in times.items()}
    total = sum(medians.values())
    found = [
        LayerTime(
            name=key if names is None else names[key],
            modules=modules.get(key, ()),
            ms=ms,
            share=ms / total if total else 0.0,
        )
        for key, ms in medians.items()
    ]
    return tuple(sorted(found, key=lambda layer: -layer.ms))
