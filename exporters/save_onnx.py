"""Write a graph to a file with one tensor in memory at a time.

`onnx.save` holds a model three times: the tensors, their copies in the protobuf, and the serialized bytes. A protobuf
message is its fields one after the other, each a tag, a length and its bytes (protobuf.dev, Encoding), so the tensors'
bytes are streamed into the place where the message has them:

    ModelProto without graph │ tag 7, length │ GraphProto without initializers │ (tag 5, length │ TensorProto)…

Above 2 GiB, more than a protobuf may hold, the tensors go to `NAME.data` beside the file, as external data.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import onnx
import onnx_ir as ir

_LIMIT_BYTES = 2**31 - 2**24  # what a protobuf may hold, less the room for the graph itself
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_RAW_DATA = 9
_BYTES = 2  # the wire type of what has a length


def save_onnx(model: ir.Model, path: Path, *, limit_bytes: int = _LIMIT_BYTES) -> tuple[Path, ...]:
    """Write `model` to `path`, and its tensors beside it if they take more than `limit_bytes`; return the files.

    Raises:
        OSError: the disk is full or refuses.
    """
    with _short_writes(path):
        return _save(model, path, limit_bytes)


def _save(model: ir.Model, path: Path, limit_bytes: int) -> tuple[Path, ...]:
    if _weight_bytes(model.graph) > limit_bytes:
        data = path.with_name(f"{path.name}.data")
        ir.save(model, path, external_data=data.name)
        return path, data
    tensors = [_Tensor(value) for value in model.graph.initializers.values()]
    proto = _without_initializers(model)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        _write_header(file, _MODEL_GRAPH, len(graph) + sum(tensor.framed for tensor in tensors))
        file.write(graph)
        for tensor in tensors:
            tensor.write(file)
    return (path,)


@contextlib.contextmanager
def _short_writes(path: Path) -> Iterator[None]:
    """Give an error number to what numpy's `tofile` raises without one, where a disk takes only a part."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


class _Streamed(Protocol):
    """What onnx-ir's tensors do beyond the protocol that it asks of others'."""

    def tofile(self, file: BinaryIO) -> None: ...


@dataclass(frozen=True)
class _Tensor:
    """One initializer as a field of the graph."""

    value: ir.Value

    @property
    def framed(self) -> int:
        """Bytes that it takes in the graph, tag and length included."""
        return len(_header(_GRAPH_INITIALIZER, self.length)) + self.length

    @property
    def length(self) -> int:
        """Bytes of its TensorProto."""
        return len(self._proto()) + len(_header(_TENSOR_RAW_DATA, self._tensor.nbytes)) + self._tensor.nbytes

    def write(self, file: BinaryIO) -> None:
        """Write it, tag and length first."""
        _write_header(file, _GRAPH_INITIALIZER, self.length)
        file.write(self._proto())
        _write_header(file, _TENSOR_RAW_DATA, self._tensor.nbytes)
        cast("_Streamed", self._tensor).tofile(file)

    @property
    def _tensor(self) -> ir.TensorProtocol:
        assert self.value.const_value is not None
        return self.value.const_value

    def _proto(self) -> bytes:
        """Its TensorProto without the values."""
        proto = onnx.TensorProto(name=self.value.name or "", data_type=int(self._tensor.dtype))
        proto.dims.extend(self._tensor.shape.numpy())
        return bytes(proto.SerializeToString())


def _without_initializers(model: ir.Model) -> onnx.ModelProto:
    """The protobuf of `model`, its own tensors left out; those of subgraphs stay."""
    held = dict(model.graph.initializers)
    model.graph.initializers.clear()
    try:
        return ir.to_proto(model)
    finally:
        model.graph.initializers.update(held)


def _weight_bytes(graph: ir.Graph) -> int:
    return sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)


def _write_header(file: BinaryIO, field: int, length: int) -> None:
    file.write(_header(field, length))


def _header(field: int, length: int) -> bytes:
    return bytes((*_varint(field << 3 | _BYTES), *_varint(length)))


def _varint(number: int) -> Iterator[int]:
    while number > 0x7F:
        yield number & 0x7F | 0x80
        number >>= 7
    yield number
