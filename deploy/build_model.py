"""Build the engines of one ONNX file for a device, without a checkpoint: engines, plan and gates into a folder.

OUT/engine.sm80.rtx     compiled ahead of time, where TensorRT-RTX is installed
OUT/engine.tensorrt     on the device, with its log and its inspector's layers beside it
OUT/build.json          what was asked, what was built, the plan, and what is less than required
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from pydantic import Field

from deploy.build import plan_summary
from deploy.build_options import BuildOptions
from deploy.bundle import hash_file, staged_files
from deploy.cache import Cache
from deploy.cached_build import CachedBuild
from deploy.device_engine import Via
from deploy.gates import missed_requirements, to_text
from deploy.graph_file import read_graph
from deploy.lint import check_rules
from deploy.manifest import Engine, FileEntry, Missing, Plan
from deploy.progress import Progress
from deploy.requirements import Missed, Requirement
from profiles.device import load_device
from profiles.record import Record

SCHEMA = 1
FILE_NAME = "build.json"


class MissedGate(Record):
    """A requirement that is not met, and the layers that it concerns."""

    requirement: str
    sentence: str
    layers: tuple[tuple[str, str, str, str], ...] = Field(description="Layer, asked, compiled, why.")


class BuiltModel(Record):
    """What `gpusq build MODEL` did; the same as its `--json` and as `build.json`."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model: str
    sha256: str
    profile: str
    device: str
    options: dict[str, Any] = Field(description="All options of the build, by name.")
    engines: tuple[Engine, ...]
    missing: tuple[Missing, ...]
    plan: Plan | None
    gates_missed: tuple[MissedGate, ...]
    files: dict[str, FileEntry]

    def to_text(self) -> str:
        """For the terminal."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.model} for {self.device}"
        for engine in self.engines:
            yield f"  {engine.file}: {engine.runtime} {engine.runtime_version} for {engine.target}; {engine.note}"
            if engine.sparse_chosen is not None:
                yield f"    sparse kernels for {engine.sparse_chosen} of {engine.sparse_eligible} eligible layers"
            if engine.dla_fallbacks:
                yield f"    left to the GPU by the DLA: {', '.join(engine.dla_fallbacks)}"
            if engine.tactics_skipped:
                yield f"    {engine.tactics_skipped} kernels were not tried for want of memory"
        if self.plan is not None:
            yield f"  plan: {plan_summary(self.plan)}"
        for missing in self.missing:
            yield f"  {missing.what} missing: {missing.why}; run `{missing.how}` there"


def build_model(
    model: Path,
    out: Path,
    *,
    profile: str,
    options: BuildOptions | None = None,
    required: Sequence[Requirement] = (),
    via: Via = "python",
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> BuiltModel:
    """Build the ONNX file `model` for `profile` into the folder `out`, and return what came of it.

    Args:
        model: strongly typed ONNX, such as `gpusq surgery` writes.
        out: the folder; files of the same names are replaced.
        profile: the device.
        options: what is asked of the builders.
        required: what is required beside the default.
        via: what builds TensorRT's engine on the device.
        cache: takes what was built before; nothing is kept without one.
        progress: is told what goes on.

    Raises:
        GpusqError: there is no such file or profile, or the compiler refused the model or an option.
    """
    device, options, progress = load_device(profile), options or BuildOptions(), progress or Progress()
    graph = read_graph(model)
    check_rules(graph, device)
    with staged_files(out / FILE_NAME) as file:
        gates = [word for each in required for word in ("--require", str(each))]
        name = (str(model), "--profile", profile, "--out", str(out), *gates)
        how = CachedBuild(model.name, device, options, cache or Cache(None), progress, via)
        built = how.everything(file.parent, name=name, model=model)
        found = missed_requirements(
            built.plan, built.engines, float_type=_float_type(graph), placement="as-trained", required=required
        )
        done = BuiltModel(
            model=model.name,
            sha256=hash_file(model).sha256,
            profile=device.name,
            device=device.title,
            options=json.loads(options.canonical_json()),
            engines=built.engines,
            missing=built.missing,
            plan=built.plan,
            gates_missed=tuple(_gate(each) for each in found),
            files={path.name: hash_file(path) for path in sorted(file.parent.iterdir())},
        )
        file.write_text(done.to_json(), encoding="utf-8")
    return done


def gates_text(done: BuiltModel) -> str:
    """The gates that were missed, with the layers of each, for the terminal."""
    return to_text([(gate.sentence, gate.layers) for gate in done.gates_missed])


def _gate(missed: Missed) -> MissedGate:
    return MissedGate(requirement=str(missed.requirement), sentence=missed.sentence, layers=missed.rows)


def _float_type(graph: ir.Model) -> str:
    """`float32` if the graph has float32 weights alone, else the narrower type."""
    kinds = {value.dtype for value in graph.graph.initializers.values()}
    return "float16" if kinds & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} else "float32"
