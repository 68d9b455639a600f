"""What kind of thing a path holds, judged by its content and never by its ending.

A few KB are read at most: the first bytes, a zip file's directory, the tags of a protobuf's top level. Nothing is
unpickled, and torch is not imported.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from profiles.errors import GpusqError

Kind = Literal[
    "safetensors",  # header length, JSON header, data
    "torch-zip",  # torch.save since 1.6
    "torch-legacy",  # torch.save before 1.6, or with _use_new_zipfile_serialization=False
    "torch-tar",  # torch.save before 0.2
    "torchscript",  # torch.jit.save
    "pt2",  # torch.export.save
    "onnx",
    "pickle",  # any other pickle
    "hf-folder",  # a folder with config.json
    "sharded",  # an index JSON, or a folder that holds one
    "folder",
    "json",
    "zip",
    "gguf",
    "hdf5",
    "html",  # a web page that was downloaded in the file's stead
    "lfs-pointer",  # what git leaves where Git LFS did not run
    "empty",
    "unknown",
]

HEAD_BYTES = 65536
INDEX_KEY = "weight_map"
# pickle protocol 2 of torch.serialization.MAGIC_NUMBER
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_SAFETENSORS_HEADER = 100_000_000  # the safetensors library's own limit
_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (_TORCH_LEGACY, "torch-legacy"),
    (b"GGUF", "gguf"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"version https://git-lfs.github.com/", "lfs-pointer"),
)


def kind_of(path: str | Path) -> Kind:
    """The kind of the file or folder at `path`; "unknown" where its content fits none.

    A damaged file is still of its kind where its beginning shows it. Raises GpusqError where there is nothing at
    `path` or it may not be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _kind_of_folder(path)
        with path.open("rb") as file:
            return _kind_of_file(file)
    except FileNotFoundError as error:
        raise GpusqError(f"no file or folder {str(path)!r}", hint="check the path") from error
    except OSError as error:
        raise GpusqError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def index_files(folder: Path) -> list[Path]:
    """The index JSON files of sharded checkpoints in `folder`, safetensors before pickles."""
    found = [path for path in folder.glob("*.index.json") if path.is_file() and kind_of(path) == "sharded"]
    return sorted(found, key=lambda path: (".safetensors." not in path.name, path.name))


def _kind_of_folder(path: Path) -> Kind:
    if (path / "config.json").is_file():
        return "hf-folder"
    return "sharded" if index_files(path) else "folder"


def _kind_of_file(file: BinaryIO) -> Kind:
    head = file.read(HEAD_BYTES)
    if not head:
        return "empty"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(file, head)
    if head[257:262] == b"ustar" and b"storages" in head:
        return "torch-tar"
    if _is_safetensors(head):  # before pickle: a header's length can begin like one
        return "safetensors"
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return "pickle"
    text = head.lstrip()
    if text.startswith((b"{", b"[")):
        return "sharded" if f'"{INDEX_KEY}"'.encode() in head else "json"
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "html"
    return "onnx" if _is_onnx(file) else "unknown"


def _is_safetensors(head: bytes) -> bool:
    if len(head) < 9:
        return False
    (length,) = struct.unpack_from("<Q", head)
    return 2 <= length <= _MAX_SAFETENSORS_HEADER and head[8:9] == b"{"


def _kind_of_zip(file: BinaryIO, head: bytes) -> Kind:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error):
        names = [_first_name(head)]  # the directory is lost: judge by the file that comes first
    inner = {name.partition("/")[2] or name for name in names}
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return "pt2"
    if "constants.pkl" in inner:
        return "torchscript"
    return "torch-zip" if "data.pkl" in inner else "zip"


def _first_name(head: bytes) -> str:
    if len(head) < 30:
        return ""
    (length,) = struct.unpack_from("<H", head, 26)
    return head[30 : 30 + length].decode("utf-8", "replace")


def _is_onnx(file: BinaryIO) -> bool:
    """Whether the top level is a ModelProto's: `ir_version` (field 1, varint) and `graph` (field 7, a message)."""
    seen: set[tuple[int, int]] = set()
    for field in _protobuf_fields(file):
        seen.add(field)
        if {(1, 0), (7, 2)} <= seen:
            return True
    return False


def _protobuf_fields(file: BinaryIO, most: int = 64) -> Iterator[tuple[int, int]]:
    """(number, wire type) of the first top-level fields, read by jumping from one to the next; ends at nonsense."""
    file.seek(0)
    for _ in range(most):
        tag = _varint(file)
        if tag is None:
            return
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            return
        yield number, wire
        value = _varint(file) if wire in (0, 2) else {1: 8, 5: 4}[wire]
        if value is None or value >= 1 << 63:
            return
        if wire != 0:
            file.seek(value, 1)


def _varint(file: BinaryIO) -> int | None:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def read_json(path: Path) -> object:
    """The JSON value in `path`; raises GpusqError where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise GpusqError(f"{path} is not valid JSON: {error}", hint="copy or download it again") from error
    except OSError as error:
        raise GpusqError(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
