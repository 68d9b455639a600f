"""Read an ONNX file as a compiler's parser finds it: nothing inlined, folded or mended, only named."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from exporters.external_data import check_external_data
from exporters.kinds import kind_of
from exporters.node_modules import name_modules
from exporters.onnx_proto import parse_onnx
from profiles.errors import GpusqError


def read_graph(path: Path, *, sparse: bool = False) -> ir.Model:
    """Return the graph in `path`, its weights on the disk until they are asked for, its nodes with names and modules.

    A node without a name is called as TensorRT's parser calls it, so that a compiled plan can be traced to it.

    Args:
        path: the file.
        sparse: whether the model may hold sparse tensors; they are dropped, as TensorRT's parser does it.

    Raises:
        GpusqError: there is no such file, or it is no sound ONNX model.
    """
    if path.is_file() and kind_of(path) != "onnx":
        raise GpusqError(f"{path} is no ONNX model", hint="`gpusq export` makes one of a checkpoint")
    proto = parse_onnx(path, sparse=sparse)
    check_external_data(path, proto)
    proto.graph.ClearField("sparse_initializer")
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError) as error:
        raise GpusqError(f"{path} cannot be read as a graph: {error}", hint="export the model again") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    for node in model.graph:
        if not node.name and node.outputs and node.outputs[0].name:
            node.name = f"node_of_{node.outputs[0].name}"
    name_modules(model)
    return model
