"""Arrays by input name, [N, …], from .npz, .npy and safetensors files, or a folder of them in the order of their names.

Arrays stay in their file, and a batch of them is mapped into memory when it is asked for, but for those that an .npz
holds compressed. Of pickles nothing is read.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np

from calibration.input_spec import InputSpec, fits, words
from calibration.rows import Array, Computed, Rows, chosen, converted, stacked
from calibration.selection import Choice, Read, members_of
from profiles.errors import GpusqError

LABEL = "label"
SYNTHETIC = "synthetic"
SAID_SYNTHETIC = "the file says that its samples are synthetic"
_NPY = b"\x93NUMPY"
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip file: the lengths of the name and of what follows it
_SAVEZ = "write it with numpy.savez, without objects"
_SAFETENSORS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
Convert = Callable[[str, Array], Array]


def is_array_file(path: Path) -> bool:
    """Whether `path` is an .npz, .npy or safetensors file, by its content."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK\x03\x04"):
        return zipfile.is_zipfile(path) and _holds_arrays(path)
    return head.startswith(_NPY) or (len(head) == 9 and head[8:] == b"{" and head[4:8] == b"\0\0\0\0")


def read_array_files(files: Sequence[Path], specs: Mapping[str, InputSpec], to_float: Convert, choice: Choice) -> Read:
    """Return the chosen rows of all `files`; `to_float` makes uint8 batches of an input into its floats.

    Raises:
        GpusqError: a file is damaged, an input is missing, or an array does not fit its input.
    """
    parts = [_checked(file, specs) for file in files]
    names = [f"{file.name}[{row}]" for file, part in zip(files, parts, strict=True) for row in range(_length(part))]
    stored = {name: stacked([part[name] for part in parts]) for name in specs}
    index = choice.of(names)
    used = {name: chosen(rows, index) for name, rows in stored.items()}
    labels = [part[LABEL] for part in parts if LABEL in part]
    if labels and len(labels) != len(parts):
        unlabelled = next(file for file, part in zip(files, parts, strict=True) if LABEL not in part)
        raise GpusqError(f"{unlabelled} has no labels, other files do", hint=f"add '{LABEL}', or remove it everywhere")
    return Read(
        inputs=as_inputs(used, specs, to_float),
        members=members_of([names[row] for row in index], used, str(files[0])),
        available=len(names),
        labels=np.concatenate(labels).astype(np.int64, copy=False)[index] if labels else None,
        notes=(SAID_SYNTHETIC,) if any(SYNTHETIC in part for part in parts) else (),
    )


def as_inputs(stored: Mapping[str, Rows], specs: Mapping[str, InputSpec], to_float: Convert) -> dict[str, Rows]:
    """The stored rows as the inputs take them: uint8 made floats, and everything of the input's type."""

    def convert(name: str) -> Callable[[Array], Array]:
        if stored[name].dtype == np.uint8 and _is_float(specs[name].dtype):
            return lambda batch: to_float(name, batch)
        return lambda batch: batch

    found: dict[str, Rows] = {}
    for name, spec in specs.items():
        same = stored[name].dtype == np.dtype(spec.dtype)
        found[name] = stored[name] if same else converted(stored[name], spec.dtype, convert(name))
    return found


def check_array(where: str, name: str, array: Rows, spec: InputSpec) -> None:
    """Raise GpusqError where `array` is not what the input takes."""
    if not array.shape or len(array) == 0 or not fits(array.shape[1:], spec):
        found = "×".join(map(str, array.shape)) or "a scalar"
        raise GpusqError(
            f"{where}: '{name}' is {found}, the model takes {words(spec)}", hint=_shape_hint(array.shape[1:], spec)
        )
    kind = "f" if array.dtype.name == "bfloat16" else array.dtype.kind
    if not _is_float(spec.dtype):
        if kind not in "iub":
            raise GpusqError(f"{where}: '{name}' is {array.dtype.name}", hint=f"store it as {spec.dtype}")
    elif kind != "f" and array.dtype != np.uint8:
        raise GpusqError(f"{where}: '{name}' is {array.dtype.name}", hint="store uint8 images or float model inputs")


def _checked(file: Path, specs: Mapping[str, InputSpec]) -> dict[str, Any]:
    """The arrays of one file, the labels among them, after all that its headers tell was checked."""
    arrays = _arrays(file, specs)
    for name, spec in specs.items():
        if name not in arrays:
            have = ", ".join(sorted(arrays)) or "nothing"
            raise GpusqError(
                f"{file} has no array '{name}' (it has {have})", hint="its keys must be the model's inputs"
            )
        check_array(str(file), name, arrays[name], spec)
    count, *others = [len(arrays[name]) for name in specs]
    if any(other != count for other in others):
        raise GpusqError(f"{file}: its inputs differ in the number of samples", hint="give every input of each sample")
    if LABEL in arrays and not np.issubdtype(arrays[LABEL].dtype, np.integer):
        raise GpusqError(f"{file}: '{LABEL}' is {arrays[LABEL].dtype.name}", hint="store the classes as integers")
    if LABEL in arrays and arrays[LABEL].shape != (count,):
        raise GpusqError(f"{file} has {arrays[LABEL].size} labels for {count} samples", hint="one label a sample")
    kept = {name: arrays[name] for name in (*specs, LABEL, SYNTHETIC) if name in arrays}
    return {name: _widened(_unmapped(array)) if name in specs else np.asarray(array) for name, array in kept.items()}


def _arrays(file: Path, specs: Mapping[str, InputSpec]) -> dict[str, Array]:
    with file.open("rb") as opened:
        head = opened.read(9)
    try:
        if head.startswith(_NPY):
            if len(specs) != 1:
                raise GpusqError(f"{file} holds one array, and the model has {len(specs)} inputs", hint=_SAVEZ)
            return {next(iter(specs)): np.load(file, mmap_mode="r", allow_pickle=False)}
        if head[8:] == b"{":
            return _safetensors(file)
        return _npz(file)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, struct.error) as error:
        kind = "safetensors" if head[8:] == b"{" else ".npy" if head.startswith(_NPY) else ".npz"
        raise GpusqError(f"{file} cannot be read as {kind}: {error}", hint=_SAVEZ) from None


def _npz(file: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(file):
        raise GpusqError(f"{file} is no .npz file", hint=_SAVEZ)
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
        entries = archive.infolist()
    with np.load(file, allow_pickle=False) as loaded, file.open("rb") as opened:
        found = {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            stored = entry.compress_type == zipfile.ZIP_STORED
            mapped = _mapped(file, opened, entry) if stored else None
            found[name] = loaded[name] if mapped is None else mapped
    return found


def _mapped(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> Array | None:
    """An array that an .npz holds uncompressed; None where it cannot be mapped: objects, or no elements."""
    file.seek(entry.header_offset)
    file.seek(sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))), 1)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject or 0 in shape or not shape:
        return None
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _safetensors(file: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:  # checks the whole header
            names = list(opened.keys())
    except SafetensorError as error:
        raise ValueError(error) from None
    with file.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(length))
    found = {}
    for name in names:
        dtype, (start, _) = _SAFETENSORS[header[name]["dtype"]], header[name]["data_offsets"]
        shape = tuple(header[name]["shape"])
        if 0 in shape or not shape:
            found[name] = np.zeros(shape, dtype)
            continue
        found[name] = np.memmap(file, dtype, "r", 8 + length + start, shape)
    return found


def _unmapped(array: Array) -> Rows:
    """A mapped array as rows that map it for each batch alone: what was read counts as memory until it is unmapped."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return array
    path, dtype, offset, shape = array.filename, array.dtype, array.offset, array.shape
    order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
    return Computed(shape, dtype, lambda rows: np.asarray(np.memmap(path, dtype, "r", offset, shape, order)[rows]))


def _widened(array: Rows) -> Rows:
    """bfloat16, which numpy does not compute with, as float32."""
    return converted(array, "float32", lambda batch: batch) if array.dtype.name == "bfloat16" else array


def _holds_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return True  # damaged: reading it tells how


def _shape_hint(shape: tuple[int, ...], spec: InputSpec) -> str:
    if len(shape) == len(spec.shape) == 3:
        if sorted(shape) == sorted(spec.shape):
            return "the axes stand in another order: transpose them"
        if shape[1:] == spec.shape[1:] and shape[0] == 1:
            return "repeat the grey channel, or store the colours"
    return "resize or reorder the samples"


def _length(part: Mapping[str, Any]) -> int:
    return len(next(array for name, array in part.items() if name != LABEL))


def _is_float(dtype: str) -> bool:
    return dtype == "bfloat16" or np.issubdtype(np.dtype(dtype), np.floating)
