"""Compile a model for a device on a machine without one, with TensorRT-RTX, and read its plan back.

Where an axis is dynamic, the model is compiled twice: for the whole range of batches, which is the engine and the plan,
and for the usual batch alone, which tells how many bytes the kernels move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from deploy import tensorrt_api
from deploy.build_options import BuildOptions
from deploy.manifest import Plan
from deploy.plan import read_plan
from deploy.tensorrt_api import Built, ShapeRange
from profiles.device import AheadOfTime

RUNTIME = "tensorrt-rtx"


@dataclass(frozen=True)
class Compiled:
    """The engine and its plan."""

    built: Built
    plan: Plan


def compile_ahead(
    model: Path,
    target: AheadOfTime,
    *,
    batch: ShapeRange | None = None,
    usual: Mapping[str, Sequence[int]] | None = None,
    options: BuildOptions | None = None,
    graph: ir.Model | None = None,
) -> Compiled:
    """Compile the ONNX file `model` for `target`.

    Args:
        model: strongly typed ONNX.
        target: the compute capability.
        batch: the batch sizes that the engine must take.
        usual: the shapes of inputs that vary in more axes than the first.
        options: what else is asked; the shapes in it go before `batch` and `usual`.
        graph: the graph in `model`, where it was read already.

    Raises:
        GpusqError: the parser or the compiler refused the model.
    """
    graph = graph or ir.load(model)
    batch = batch or ShapeRange()
    options = options or BuildOptions()
    build = partial(
        tensorrt_api.build_engine, model, RUNTIME, compute_capability=target.compute_capability, usual=usual
    )
    built = build(batch=batch, options=options)
    sized = None
    if _is_dynamic(graph):
        fixed = ShapeRange(batch.usual, batch.usual, batch.usual)
        sized = build(batch=fixed, options=options.at_usual()).log
    plan = read_plan(
        built.log,
        graph,
        source=f"TensorRT-RTX {built.runtime_version}, ahead of time",
        target=target.compute_capability,
        sized=sized,
        sizes=_sizes(graph, batch.usual, usual or {}) | {given.name: given.usual for given in options.profiles[0]},
        lacks=target.lacks,
    )
    return Compiled(built, plan)


def _is_dynamic(graph: ir.Model) -> bool:
    return any(value.shape is None or not value.shape.is_static() for value in graph.graph.inputs)


def _sizes(graph: ir.Model, batch: int, usual: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs, what is dynamic replaced as in tensorrt_api."""
    shapes = {value.name or "": value.shape for value in graph.graph.inputs if value.shape is not None}
    return {
        name: tuple(
            dim if isinstance(dim, int) else batch if axis == 0 or name not in usual else usual[name][axis]
            for axis, dim in enumerate(shape)
        )
        for name, shape in shapes.items()
    }
