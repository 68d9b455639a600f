"""Open a checkpoint by its content, never by its ending, and run no code that it brings along."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from exporters.passes.insert_qdq import QuantizedLinear
from exporters.student_file import WEIGHT, StudentFile, read_student
from profiles.errors import GpusqError

_PICKLE_PROTOCOL = b"\x80"
_SAFETENSORS_HEADER = b"{"  # behind the eight bytes of the header's length, the first of which may be any


def load_checkpoint(path: Path) -> StudentFile:
    """Return the student in `path`.

    Raises:
        GpusqError: there is no such file, or it is a pickle, damaged, or not a student.
    """
    if path.is_dir():
        raise GpusqError(f"{path} is a folder", hint="give the checkpoint file itself")
    if not path.is_file():
        raise GpusqError(f"no such file: {path}", hint="give the path of a trained student (.safetensors)")
    _refuse_pickle(path)
    return read_student(path)


def quantized_linears(student: StudentFile) -> Mapping[str, QuantizedLinear]:
    """Return what training decided about each INT8 linear layer, by module; empty for a float student."""
    return {
        module: QuantizedLinear(
            weight=student.tensors[module + WEIGHT].astype(np.int8, copy=False),
            weight_scale=scale.astype(np.float32, copy=False),
            input_scale=student.input_scales[module].astype(np.float32, copy=False),
        )
        for module, scale in student.weight_scales.items()
    }


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == _SAFETENSORS_HEADER:
        return
    hint = "convert it once, in the environment that trained it, with exporters.student_file.write_student"
    if start[:1] == _PICKLE_PROTOCOL:
        raise GpusqError(f"{path} is a Python pickle: opening it can run any code, so it is not opened", hint=hint)
    if start[:2] == b"PK" and _holds_pickle(path):
        raise GpusqError(f"{path} is a torch.save file, a pickle inside a zip: it is not opened", hint=hint)


def _holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
