"""Check the files that hold an ONNX model's external data, before they are mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from exporters.onnx_proto import bytes_of, tensors_of
from profiles.errors import GpusqError

_SAVE_AGAIN = "save the model again with onnx.save_model(..., save_as_external_data=True)"


def external_files(path: Path, proto: onnx.ModelProto) -> set[Path]:
    """The files that hold external data of the model at `path`; raises as `check_external_data` does."""
    return set(_checked(path, proto))


def check_external_data(path: Path, proto: onnx.ModelProto) -> None:
    """Raise GpusqError unless every external tensor of the model at `path` lies whole in a file beside it."""
    for _ in _checked(path, proto):
        pass


def _checked(path: Path, proto: onnx.ModelProto) -> Iterator[Path]:
    """The file of each external tensor, checked."""
    for place, tensor in tensors_of(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        if not place.startswith("initializer"):
            raise GpusqError(
                f"{path}: {place} is external data; only initializers may be",
                hint="save the model again with convert_attribute=False",
            )
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = _file(path, place, entries.get("location", ""))
        _check_extent(path, f"{place}, in {file}", tensor, entries, file.stat().st_size)
        yield file


def _file(path: Path, place: str, location: str) -> Path:
    if not location or "\0" in location:
        raise GpusqError(f"{path}: {place} is external but names no file", hint=_SAVE_AGAIN)
    parts = PurePosixPath(location.replace("\\", "/")).parts
    if ".." in parts or PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor:
        raise GpusqError(
            f"{path}: the external data of {place} lies outside the model's folder: {location!r}",
            hint=f"put the data file beside the model; {_SAVE_AGAIN}",
        )
    file = path.parent / location
    if not _is_file(file):
        raise GpusqError(
            f"{path}: {place} is external data in {location!r}, and there is no such file",
            hint=f"copy {location!r} into {path.parent}, beside the model",
        )
    # onnx-ir refuses to map these as well, with a ValueError: either could reach any file of this machine.
    if not file.resolve().is_relative_to(path.parent.resolve()) or file.stat().st_nlink > 1:
        raise GpusqError(
            f"{path}: the external data {location!r} is a link to a file outside the model's folder",
            hint="copy the model and its data into one folder (cp --dereference)",
        )
    return file


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # such as a name that is too long
        return False


def _check_extent(path: Path, place: str, tensor: onnx.TensorProto, entries: Mapping[str, str], size: int) -> None:
    wanted = bytes_of(tensor)
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or wanted)
    except ValueError:
        raise GpusqError(f"{path}: {place}: offset or length is no number", hint=_SAVE_AGAIN) from None
    if offset < 0 or length != wanted:
        raise GpusqError(
            f"{path}: {place}: {length} bytes at {offset} are declared, its shape and type take {wanted}",
            hint=_SAVE_AGAIN,
        )
    if offset + length > size:
        raise GpusqError(
            f"{path}: {place}: the file has {size} bytes, the tensor ends at {offset + length}",
            hint="copy or download the data file again: it is truncated or belongs to another model",
        )
