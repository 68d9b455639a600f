"""onnxruntime on the CPU: sessions, the optimized model as an engine, and its plan.

Every session asks for exact 8-bit arithmetic (`session.x64quantprecision`): on processors without VNNI, onnxruntime's
fast kernels add pairs of products in 16 bits and saturate, and the student answers wrongly and says nothing.

And the threads of every session stop spinning when a call ends (`session.force_spinning_stop`). Else they look for work
on the cores that the next call of another session needs: where two sessions were timed in turn on two cores, the median
call took twice its time, and one in twenty six times.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibration.inference import session_options
from deploy.manifest import BlockAttention, Kernel, Plan
from deploy.own_integers import with_own_integers
from exporters.attentions import find_attentions
from exporters.linears import find_linears
from exporters.module_names import label_of

PROVIDERS = ["CPUExecutionProvider"]
# Before a Reshape and from opset 21 on, this one inserts a quantizer without a zero-point, and onnxruntime cannot load
# the graph that it made (microsoft/onnxruntime#25526).
_MOVES_QDQ = "QDQPropagationTransformer"
_GEMMS = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm"})
_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv"})
_ATTENTIONS = frozenset({"Attention", "MultiHeadAttention", "QAttention"})
# The names that TensorRT's compiler gives the types.
_TYPES = {
    ir.DataType.FLOAT: "Float",
    ir.DataType.FLOAT16: "Half",
    ir.DataType.INT8: "Int8",
    ir.DataType.UINT8: "UInt8",
}
_8_BIT = frozenset({"MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "QAttention"})


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def open_session(
    model: Path, *, optimized_path: Path | None = None, optimize: bool = True, profile: Path | None = None
) -> Any:
    """Return an onnxruntime.InferenceSession for `model` on the CPU.

    Args:
        model: an ONNX file.
        optimized_path: where to write the optimized model; None writes none.
        profile: how the name of the file begins that the session writes at the end, with the time of each node.
        optimize: let onnxruntime fuse and move operators; without it each node is computed as it is written.

    Raises:
        OSError: the disk had no room for the optimized model.
    """
    import onnxruntime

    options = session_options()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _open(model, options, Path(folder))
    except Exception as error:
        # onnxruntime says "Protobuf serialization failed" when the disk is full.
        if optimized_path is not None and shutil.disk_usage(optimized_path.parent).free < model.stat().st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(optimized_path)) from error
        raise


def _open(model: Path, options: Any, folder: Path) -> Any:
    """A session of the model, or of an equal one where onnxruntime cannot load what its optimizers make of it."""
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(model), options, providers=PROVIDERS)
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        separated = with_own_integers(model, folder)
    if separated is not None:
        try:
            return onnxruntime.InferenceSession(str(separated), options, providers=PROVIDERS)
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
            model = separated
    return onnxruntime.InferenceSession(str(model), options, providers=PROVIDERS, disabled_optimizers=[_MOVES_QDQ])


def runtime_version() -> str:
    """The version of onnxruntime."""
    import onnxruntime

    return str(onnxruntime.__version__)


def read_plan(optimized: ir.Model, model: ir.Model) -> Plan:
    """Return what onnxruntime made of `model`: one kernel for each node of the `optimized` graph.

    onnxruntime keeps a node's name when it fuses others into it, so linear layers are found by name.
    """
    by_name = {node.name: node for node in optimized.graph}
    gemms = (linear for linear in find_linears(model.graph) if linear.kind == "gemm")
    linears = [by_name[name] for linear in gemms if (name := linear.node.name) in by_name]
    kernels = tuple(_kernel(node) for node in optimized.graph)
    return Plan(
        source=f"onnxruntime {runtime_version()}, optimized graph",
        target="cpu",
        kernels=kernels,
        gemms_by_type=dict(Counter(kernel.types[0] for kernel in kernels if kernel.kind == "gemm")),
        convolutions_by_type=dict(Counter(kernel.types[0] for kernel in kernels if kernel.kind == "convolution")),
        linear_gemms=sum(node.op_type in _GEMMS for node in linears),
        linear_gemms_int8=sum(node.op_type in _8_BIT for node in linears),
        attentions=tuple(
            BlockAttention(
                module=label_of(node),
                fused=node.name in by_name and by_name[node.name].op_type in _ATTENTIONS,
            )
            for node in find_attentions(model.graph)
        ),
        kernels_per_block={},
    )


def _kernel(node: ir.Node) -> Kernel:
    kinds = ((_GEMMS, "gemm"), (_CONVOLUTIONS, "convolution"), (_ATTENTIONS, "attention"))
    kind = next((kind for names, kind in kinds if node.op_type in names), "pointwise")
    module = (node.name or "").rpartition("/")[0]
    if node.op_type in _8_BIT:
        types: tuple[str, ...] = ("Int8",)
    else:
        known = (_TYPES.get(value.dtype) for value in node.inputs if value is not None and value.dtype is not None)
        types = tuple(name for name in known if name) or ("unknown",)
    return Kernel(name=node.op_type, kind=kind, types=types, modules=(module,) if module else ())
