"""Take the 2:4 weights out of a bundle's ONNX files, and put them back where they were, bit for bit.

    model.onnx = 4 096 bytes, weight, 96 bytes, weight, …
      → rest    4 096 bytes, 96 bytes, …
      → values  of the weights, the two of four that are kept (deploy.sparse_layout)
      → places  where those stand; apart from the values, because they compress well and the values do not
      → pieces  where each weight was cut out, and its layout

Weights are found by the bytes that ONNX's own reader gives, in the file or in its external data; nothing else in the
file is interpreted, so nothing else can be lost.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from deploy.sparse_layout import Layout, decode, encode, find_layout
from profiles.record import Record

_BITS = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT": 32}
_LEAST_BYTES = 256
_AXES = 2  # of a weight


class Piece(Record):
    """One weight that was taken out of a file."""

    name: str
    offset: int = Field(ge=0, description="In the whole file.")
    shape: tuple[int, ...]
    bits: int
    axis: int
    paired: bool

    @property
    def layout(self) -> Layout:
        """How it was encoded."""
        return Layout(self.shape, self.bits, self.axis, self.paired)


@dataclass(frozen=True)
class Cut:
    """A file without its 2:4 weights."""

    rest: bytes
    values: bytes
    places: bytes
    pieces: tuple[Piece, ...]


def cut_bundle(bundle: Path, names: list[str]) -> dict[str, Cut]:
    """Cut every file of `names` that holds 2:4 weights of one of the ONNX files among them."""
    found: dict[str, list[Piece]] = {}
    for name in names:
        if name.endswith(".onnx"):
            for file, piece in _pieces(bundle, name):
                if file in names:
                    found.setdefault(file, []).append(piece)
    return {file: _cut((bundle / file).read_bytes(), pieces) for file, pieces in found.items()}


def restore(cut: Cut) -> bytes:
    """The whole file that was cut.

    Raises:
        ValueError: the parts do not fit one another.
    """
    rest, values, places = io.BytesIO(cut.rest), io.BytesIO(cut.values), io.BytesIO(cut.places)
    whole = io.BytesIO()
    for piece in cut.pieces:
        layout, gap = piece.layout, piece.offset - whole.tell()
        if gap < 0 or whole.write(rest.read(gap)) != gap:
            raise ValueError(f"{piece.name} was not cut out of this file")
        whole.write(decode(values.read(layout.values_bytes), places.read(layout.places_bytes), layout))
    if values.read(1) or places.read(1):
        raise ValueError("there are more weights than were cut out of this file")
    whole.write(rest.read())
    return whole.getvalue()


def _cut(content: bytes, pieces: list[Piece]) -> Cut:
    rest, encoded, kept, done = [], [], [], 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if piece.offset < done:
            continue  # two initializers share their bytes
        end = piece.offset + piece.layout.plain_bytes
        rest.append(content[done : piece.offset])
        encoded.append(encode(content[piece.offset : end], piece.layout))
        kept.append(piece)
        done = end
    values, places = (b"".join(part[which] for part in encoded) for which in (0, 1))
    cut = Cut(b"".join([*rest, content[done:]]), values, places, tuple(kept))
    if restore(cut) != content:
        raise RuntimeError("a file with 2:4 weights does not come back as it was")
    return cut


def _pieces(bundle: Path, name: str) -> Iterator[tuple[str, Piece]]:
    """The 2:4 weights of an ONNX file, each with the file that holds its bytes."""
    import onnx

    content = (bundle / name).read_bytes()
    model = onnx.load_from_string(content)
    start = 0
    for tensor in model.graph.initializer:
        bits = _BITS.get(onnx.TensorProto.DataType.Name(tensor.data_type))
        if bits is None:
            continue
        if tensor.HasField("raw_data"):
            file, data, offset = name, tensor.raw_data, content.find(tensor.raw_data, start)
            start = max(start, offset)
        elif tensor.external_data:
            file, data, offset = _external(bundle, name, tensor)
        else:
            continue
        if len(tensor.dims) < _AXES or len(data) < _LEAST_BYTES or offset < 0:
            continue
        layout = find_layout(data, tuple(tensor.dims), bits)
        if layout is not None:
            yield (
                file,
                Piece(
                    name=tensor.name,
                    offset=offset,
                    shape=layout.shape,
                    bits=bits,
                    axis=layout.axis,
                    paired=layout.paired,
                ),
            )


def _external(bundle: Path, name: str, tensor: Any) -> tuple[str, bytes, int]:
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = (bundle / name).parent / where["location"]
    offset = int(where.get("offset", 0))
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(int(where.get("length", -1)))
    return path.relative_to(bundle).as_posix(), data, offset
