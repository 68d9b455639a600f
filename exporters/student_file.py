"""Read and write the project's own student format: one safetensors file with the weights, the scales and the card.

Metadata (every value is a string, as safetensors wants it):

    format          "gpusq-student"
    format_version  "1"; a reader refuses anything newer
    model           "package.module:factory", the function that builds the torch module
    config          JSON object, the factory's keyword arguments
    inputs          JSON object, name → {"shape", "dtype", "scale", "mean", "std"}; the shape leaves out the batch, and
                    a uint8 sample x becomes the model's input as (x · scale − mean) / std
    outputs         JSON array with the name of the one output, logits [N, classes]
    card            JSON object: seed, accuracies, epochs, seconds, versions; free-form

Tensors are the module's state dict in float32 or float16. A linear module M that was trained quantized has instead:

    M.weight        int8 [N, K], symmetric, within [-127, 127]
    M.weight_scale  float32 [N], strictly positive: the real weight is M.weight · M.weight_scale[:, None]
    M.input_scale   float32 [], strictly positive: the input is clamp(round_half_even(x / s), -128, 127) · s

Biases stay float. Weights that were pruned 2:4 are exact zeros; the format has no separate mask. Neither reading nor
writing imports torch.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calibration.samples import InputSpec
from profiles.errors import GpusqError
from profiles.record import first_problem

FORMAT = "gpusq-student"
FORMAT_VERSION = 1
FLOATS = ("float32", "float16")
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = ".weight", ".weight_scale", ".input_scale"
REWRITE = "write it with exporters.student_file.write_student"
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StudentFile:
    """A student as it lies in the file.

    `tensors` is the state dict (float32, float16; int8 where quantized); `weight_scales` (float32 [N]) and
    `input_scales` (float32 []) are keyed by the module's name, `blocks.0.attn.qkv`.
    """

    model: str
    config: dict[str, Any]
    inputs: dict[str, InputSpec]
    outputs: tuple[str, ...]
    tensors: dict[str, Array]
    weight_scales: dict[str, Array] = field(default_factory=dict)
    input_scales: dict[str, Array] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)


def read_student(path: str | Path) -> StudentFile:
    """The student in `path`; raises GpusqError, naming the tensor or the key at fault, where it is not a sound one."""
    path = Path(path)
    metadata, stored = _load(path)
    _check_format(path, metadata)
    student = StudentFile(
        model=_text(path, metadata, "model"),
        config=_json(path, metadata, "config", dict),
        inputs=_inputs(path, _json(path, metadata, "inputs", dict)),
        outputs=_outputs(path, _json(path, metadata, "outputs", list)),
        card=_json(path, metadata, "card", dict),
        tensors={name: a for name, a in stored.items() if not name.endswith((WEIGHT_SCALE, INPUT_SCALE))},
        weight_scales=_suffixed(stored, WEIGHT_SCALE),
        input_scales=_suffixed(stored, INPUT_SCALE),
    )
    check_student(student, str(path))
    return student


def write_student(path: str | Path, student: StudentFile) -> None:
    """Write `student` to `path`, atomically; raises GpusqError where it would not be read back."""
    path = Path(path)
    check_student(student, str(path))
    stored = {name: np.ascontiguousarray(a) for name, a in student.tensors.items()}
    stored |= {module + WEIGHT_SCALE: np.ascontiguousarray(s) for module, s in student.weight_scales.items()}
    stored |= {module + INPUT_SCALE: np.asarray(s) for module, s in student.input_scales.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": student.model,
        "config": json.dumps(student.config),
        "inputs": json.dumps({name: asdict(spec) for name, spec in student.inputs.items()}),
        "outputs": json.dumps(student.outputs),
        "card": json.dumps(student.card),
    }
    _replace(path, save(stored, metadata))


def check_student(student: StudentFile, source: str) -> None:
    """Raise GpusqError for the first tensor or scale of `student` that the format does not allow."""
    for name, array in student.tensors.items():
        if array.dtype.name == "int8" and name.endswith(WEIGHT):
            _check_quantized(student, source, name.removesuffix(WEIGHT))
        elif array.dtype.name not in FLOATS:
            raise GpusqError(
                f"{source}: tensor {name!r} is {array.dtype.name}",
                hint="store it as float32 or float16, or as an int8 'M.weight' with its scales",
            )
        elif not np.isfinite(array).all():
            raise GpusqError(
                f"{source}: tensor {name!r} holds NaN or infinity",
                hint="the training diverged: write the last checkpoint whose loss was finite",
            )
    for suffix, scales in ((WEIGHT_SCALE, student.weight_scales), (INPUT_SCALE, student.input_scales)):
        for module in scales:
            weight = student.tensors.get(module + WEIGHT)
            if weight is None or weight.dtype != np.int8:
                raise GpusqError(
                    f"{source}: scale {module + suffix!r} belongs to no int8 weight {module + WEIGHT!r}",
                    hint="store the weight as int8 next to its scale, or drop the scale",
                )


def _check_quantized(student: StudentFile, source: str, module: str) -> None:
    weight = student.tensors[module + WEIGHT]
    if weight.ndim != 2 or (weight == -128).any():
        raise GpusqError(
            f"{source}: tensor {module + WEIGHT!r} is not a symmetric int8 matrix (shape {weight.shape})",
            hint="quantized weights are [N, K] and lie within [-127, 127]",
        )
    _check_scale(source, module + WEIGHT_SCALE, student.weight_scales.get(module), (weight.shape[0],))
    _check_scale(source, module + INPUT_SCALE, student.input_scales.get(module), ())


def _check_scale(source: str, name: str, scale: Array | None, shape: tuple[int, ...]) -> None:
    if scale is None:
        module = name.rpartition(".")[0]
        raise GpusqError(
            f"{source}: {module + WEIGHT!r} is int8 but {name!r} is missing",
            hint="write the trained scale next to the weight; a scale cannot be guessed from int8 values",
        )
    if scale.dtype != np.float32 or scale.shape != shape:
        raise GpusqError(
            f"{source}: scale {name!r} is {scale.dtype.name} {list(scale.shape)}, expected float32 {list(shape)}",
            hint="weights have one scale per output channel, inputs have one per tensor",
        )
    if not np.isfinite(scale).all() or (scale <= 0).any():
        raise GpusqError(
            f"{source}: scale {name!r} is not finite and strictly positive everywhere",
            hint="give a channel whose weights are all zero any positive scale, such as 1.0",
        )


def _load(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    try:
        with safe_open(path, framework="numpy") as file:
            stored = {}
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                dtype = file.get_slice(name).get_dtype()
                if dtype not in ("F32", "F16", "I8"):
                    raise GpusqError(f"{path}: tensor {name!r} is {dtype}", hint="store it as float32, float16 or int8")
                stored[name] = file.get_tensor(name)
            return file.metadata() or {}, stored
    except FileNotFoundError as error:
        raise GpusqError(f"no student file {str(path)!r}", hint="check the path") from error
    except (SafetensorError, OSError) as error:
        raise GpusqError(
            f"{path} is not a whole safetensors file: {error}",
            hint="copy or download it again; pickled checkpoints (.pt, .pth) are not this format",
        ) from error


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise GpusqError(
            f"{path}: format is {metadata.get('format')!r}, expected {FORMAT!r}",
            hint=REWRITE,
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) < 1:
        raise GpusqError(f"{path}: format_version {version!r} is no version", hint=f"it must be '{FORMAT_VERSION}'")
    if int(version) > FORMAT_VERSION:
        raise GpusqError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest known here",
            hint="update gpusq, or write the file with an older one",
        )


def _text(path: Path, metadata: dict[str, str], key: str) -> str:
    if key not in metadata:
        raise GpusqError(f"{path}: metadata key {key!r} is missing", hint=REWRITE)
    return metadata[key]


def _json(path: Path, metadata: dict[str, str], key: str, kind: type) -> Any:
    try:
        value = json.loads(_text(path, metadata, key))
    except json.JSONDecodeError as error:
        raise GpusqError(f"{path}: metadata key {key!r} is not JSON: {error}", hint=REWRITE) from error
    if not isinstance(value, kind):
        raise GpusqError(f"{path}: metadata key {key!r} is not a JSON {kind.__name__}", hint=REWRITE)
    return value


def _inputs(path: Path, raw: dict[str, Any]) -> dict[str, InputSpec]:
    try:
        inputs = TypeAdapter(dict[str, InputSpec]).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise GpusqError(
            f"{path}: metadata key 'inputs' does not describe its inputs: {first_problem(error)}",
            hint="each input has exactly shape, dtype, scale, mean and std",
        ) from None
    if not inputs:
        raise GpusqError(f"{path}: metadata key 'inputs' names no input", hint="describe what the model takes")
    return inputs


def _outputs(path: Path, raw: list[Any]) -> tuple[str, ...]:
    if len(raw) != 1 or not isinstance(raw[0], str):
        raise GpusqError(f"{path}: metadata key 'outputs' is {raw}", hint="it names the one output, the logits")
    return tuple(raw)


def _suffixed(stored: dict[str, Array], suffix: str) -> dict[str, Array]:
    return {name.removesuffix(suffix): array for name, array in stored.items() if name.endswith(suffix)}


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
