"""Parse an ONNX protobuf and check what no later step may trip over: its text, its tensors, its versions.

Protobuf accepts almost any bytes, and onnx-ir reads tensors lazily: without these checks, a damaged file would fail far
from here, when a pass first asks for the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from profiles.errors import GpusqError

COPY_AGAIN = "copy or download it again, or export the model once more"
OLDEST_OPSET = 7
_PROTOBUF_LIMIT = 2**31 - 1
_GIT_LFS = b"version https://git-lfs"
_TYPES = {int(dtype): dtype for dtype in ir.DataType if dtype != ir.DataType.UNDEFINED}
_TWO_NUMBERS = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)
_SIX_BIT = 6


def parse_onnx(path: Path, *, sparse: bool = False) -> onnx.ModelProto:
    """The protobuf in `path`, its external data untouched, its text, tensors and opsets sound.

    Args:
        path: the file.
        sparse: whether it may hold sparse tensors.

    Raises:
        GpusqError: there is no such file, or it is empty, damaged, or no ONNX model.
    """
    proto = _parsed(path, _content(path))
    if undecodable := _bad_text(proto):
        raise GpusqError(f"{path}: {undecodable} is no UTF-8 text", hint=COPY_AGAIN)
    if not proto.HasField("graph"):
        what = "has no graph" if proto.ir_version and proto.opset_import else "is no ONNX model"
        raise GpusqError(f"{path} {what}", hint="give the .onnx file that the exporter wrote")
    for place, tensor in tensors_of(proto):
        if trouble := _trouble(tensor):
            raise GpusqError(f"{path}: {place} {trouble}", hint=COPY_AGAIN)
    if not sparse:
        _check_sparse(path, proto)
    _check_opsets(path, proto)
    return proto


def tensors_of(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every tensor of the model with the words for where it is: initializers, attributes, subgraphs, functions."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of `graph` and of its subgraphs."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs(node):
            yield from nodes_of(subgraph)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node such as If or Loop carries."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def label(node: onnx.NodeProto) -> str:
    """A node's name, or what it computes where it has none."""
    return f"node {node.name!r}" if node.name else f"the {node.op_type} that computes {', '.join(node.output)!r}"


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operators; 0 where none is declared."""
    return max((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), default=0)


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise GpusqError(f"{path} is a folder", hint="give the .onnx file itself")
    if not path.is_file():
        raise GpusqError(f"no such file: {path}", hint="give the path of an .onnx file")
    if not (size := path.stat().st_size):
        raise GpusqError(f"{path} is empty", hint=COPY_AGAIN)
    if size > _PROTOBUF_LIMIT:
        raise GpusqError(
            f"{path} is larger than 2 GiB, which protobuf cannot hold",
            hint="save the model with external data (onnx.save_model(..., save_as_external_data=True))",
        )
    return path.read_bytes()


def _parsed(path: Path, content: bytes) -> onnx.ModelProto:
    if content.startswith(_GIT_LFS):
        raise GpusqError(f"{path} is a Git LFS pointer, not the model", hint="run git lfs pull")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise GpusqError(f"{path} is no whole protobuf: it is truncated or no ONNX file", hint=COPY_AGAIN) from error
    return proto


def _bad_text(message: Message, place: str = "") -> str:
    """The path of the first text field that is not UTF-8, for which protobuf hands out bytes; "" if there is none."""
    for field, value in message.ListFields():
        here = f"{place}.{field.name}" if place else field.name
        if field.type == FieldDescriptor.TYPE_STRING:
            if any(isinstance(text, bytes) for text in ([value] if isinstance(value, str | bytes) else value)):
                return here
        elif field.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                if found := _bad_text(item, here):
                    return found
    return ""


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for tensor in graph.initializer:
        yield f"initializer {tensor.name!r}", tensor
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    for attribute in node.attribute:
        place = f"attribute {attribute.name!r} of {label(node)}"
        if attribute.HasField("t"):
            yield place, attribute.t
        yield from ((place, tensor) for tensor in attribute.tensors)
    for subgraph in subgraphs(node):
        yield from _graph_tensors(subgraph)


def bytes_of(tensor: onnx.TensorProto) -> int:
    """The bytes that a tensor of this type and shape occupies; strings count for nothing."""
    dtype = _TYPES[tensor.data_type]
    return 0 if dtype == ir.DataType.STRING else -(-math.prod(tensor.dims) * dtype.bitwidth // 8)


def _trouble(tensor: onnx.TensorProto) -> str:
    if tensor.data_type not in _TYPES:
        return f"has the unknown type {tensor.data_type}"
    if any(length < 0 for length in tensor.dims):
        return f"has the negative shape {list(tensor.dims)}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return ""
    held, wanted = _lengths(tensor)
    shape = "×".join(map(str, tensor.dims)) or "scalar"
    return "" if held == wanted else f"holds {held} items, its shape ({shape}) and type take {wanted}"


def _lengths(tensor: onnx.TensorProto) -> tuple[int, int]:
    """How long the stored data is and how long it must be, in bytes or in entries of its field."""
    dtype, size = _TYPES[tensor.data_type], math.prod(tensor.dims)
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        return len(tensor.raw_data), bytes_of(tensor)
    held = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    if dtype in _TWO_NUMBERS:
        return held, 2 * size
    packed = dtype != ir.DataType.STRING and dtype.bitwidth < _SIX_BIT
    return held, bytes_of(tensor) if packed else size


def _check_sparse(path: Path, proto: onnx.ModelProto) -> None:
    sparse = [tensor.values.name for tensor in proto.graph.sparse_initializer]
    for node in nodes_of(proto.graph):
        sparse += [node.name for attribute in node.attribute if attribute.HasField("sparse_tensor")]
        sparse += [tensor.values.name for graph in subgraphs(node) for tensor in graph.sparse_initializer]
    if sparse:
        raise GpusqError(
            f"{path}: {sparse[0]!r} is stored as a sparse tensor, which TensorRT does not read",
            hint="store it dense; 2:4 sparsity is found in the zeros of a dense weight",
        )


def _check_opsets(path: Path, proto: onnx.ModelProto) -> None:
    opset, newest = opset_of(proto), onnx.defs.onnx_opset_version()
    if not opset and any(node.domain in ("", "ai.onnx") for node in nodes_of(proto.graph)):
        raise GpusqError(f"{path} declares no opset for the standard operators", hint=COPY_AGAIN)
    if opset > newest:
        raise GpusqError(
            f"{path} has opset {opset}, the newest known here is {newest}",
            hint=f"export it with opset {newest} or older, or update the onnx package",
        )
    if opset and opset < OLDEST_OPSET:
        raise GpusqError(
            f"{path} has opset {opset}, too old to be raised exactly",
            hint=f"export the model again with opset {OLDEST_OPSET} or newer, best 17",
        )
