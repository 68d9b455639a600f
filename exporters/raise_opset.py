"""Raise an older model to opset 13, the first with per-channel Q/DQ, by onnx's own version converter.

The converter knows no subgraphs (it would leave their operators at the old version) and must copy what it is given, so
large weights wait outside as inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx.version_converter

from exporters.onnx_proto import bytes_of, opset_of, subgraphs
from profiles.errors import GpusqError

OPSET = 13
_LARGE_BYTES = 1024


def set_weights_aside(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Turn large and external initializers into inputs, in place, and return them."""
    inputs = {value.name for value in graph.input}
    aside: list[onnx.TensorProto] = []
    kept: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        (aside if external or bytes_of(tensor) > _LARGE_BYTES else kept).append(tensor)
    for tensor in aside:
        if tensor.name not in inputs:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
    kept_copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept_copies)
    return aside


def raise_opset(path: Path, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model at opset 13, or `proto` itself where it is that new.

    Raises:
        GpusqError: onnx's converter cannot raise it.
    """
    opset = opset_of(proto)
    if not opset or opset >= OPSET:
        return proto
    hint = f"export the model again with opset {OPSET} or newer"
    if branching := _with_subgraphs(proto.graph.node):
        raise GpusqError(
            f"{path} has opset {opset} and control flow ({branching[0].op_type}), which cannot be raised exactly",
            hint=hint,
        )
    if proto.functions:
        raise GpusqError(f"{path} has opset {opset} and local functions, which cannot be raised exactly", hint=hint)
    try:
        return onnx.version_converter.convert_version(proto, OPSET)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise GpusqError(f"{path}: opset {opset} cannot be raised to {OPSET}: {reason}", hint=hint) from error


def _with_subgraphs(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    return [node for node in nodes if any(True for _ in subgraphs(node))]
