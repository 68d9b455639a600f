"""Build the torch module of a student file, the project's own format, with its trained scales as quantizers.

Only factories of the `students` package are imported on a file's word, so reading a checkpoint never runs code that the
checkpoint brought along.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import torch
from torch import nn

from calibration.samples import InputSpec
from exporters.fake_quantize import attach
from exporters.load_state import load_state
from exporters.quantizer import INPUT, Place, Quantizer
from exporters.signature import Input, axis_name
from exporters.student import ModuleStudent
from exporters.student_file import WEIGHT, StudentFile
from profiles.errors import GpusqError

FACTORY = re.compile(r"(students(?:\.[A-Za-z_]\w*)+):([A-Za-z_]\w*)")
_CONFIG = "the config must be the one that the student was trained with"
_BATCH = 2


def to_student(file: StudentFile) -> ModuleStudent:
    """The student in `file`; its batch may vary. Raises GpusqError where its tensors or scales do not fit its model."""
    module = build_module(file)
    return ModuleStudent(
        module=module,
        inputs=tuple(_input(name, spec) for name, spec in file.inputs.items()),
        model=file.model,
        kind="gpusq student file",
        outputs=file.outputs,
        quantizers=_quantizers(file, dict(module.named_modules())),
        preprocessing=file.inputs,
        card=file.card,
    )


def _input(name: str, spec: InputSpec) -> Input:
    return Input(name, (_BATCH, *spec.shape), spec.dtype, {0: axis_name(name, 0)})


def build_module(student: StudentFile) -> nn.Module:
    """The student's module in eval mode with float32 weights, `int8 * scale` where quantized; inputs stay float.

    Raises GpusqError where the factory is not one of the `students` package, or the tensors do not fit its module.
    """
    module = _make(student)
    state = {name: torch.from_numpy(_real(student, name)) for name in student.tensors}
    load_state(module, state, student.model, _CONFIG)
    return module.eval()


def fake_quant_module(student: StudentFile) -> nn.Module:
    """`build_module`, with its quantizers: what an INT8 engine is compared with."""
    found = to_student(student)
    attach(found.module, found.quantizers)
    return found.module


def _quantizers(student: StudentFile, modules: dict[str, nn.Module]) -> dict[Place, Quantizer]:
    quantizers = {}
    for name, scale in student.input_scales.items():
        if not isinstance(modules[name], nn.Linear):
            raise GpusqError(
                f"{name!r} has an input scale but is a {type(modules[name]).__name__} in {student.model}",
                hint="only nn.Linear modules can be quantized in a student file",
            )
        quantizers[Place(name, INPUT)] = Quantizer(scale)
    for name, scale in student.weight_scales.items():
        quantizers[Place(name, WEIGHT.removeprefix("."))] = Quantizer(scale, axis=0)
    return quantizers


def _make(student: StudentFile) -> nn.Module:
    match = FACTORY.fullmatch(student.model)
    if match is None:
        raise GpusqError(
            f"model {student.model!r} is not a factory of the students package",
            hint="name it 'students.package.module:factory'; no other code is run on a checkpoint's word",
        )
    module_name, function = match.groups()
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise GpusqError(
            f"model {student.model!r} is not installed: {error}", hint="install the gpusq version that has it"
        ) from error
    factory = getattr(found, function, None)
    if not callable(factory) or getattr(factory, "__module__", None) != module_name:
        raise GpusqError(f"{module_name} defines no factory {function!r}", hint="install the gpusq version that has it")
    try:
        module = factory(**student.config)
    except (TypeError, ValueError) as error:
        raise GpusqError(
            f"{student.model} does not take the config {student.config}: {error}",
            hint="the config must be the keyword arguments that the student was trained with",
        ) from error
    if not isinstance(module, nn.Module):
        raise GpusqError(f"{student.model} returns no torch module", hint="name a factory of a torch module")
    return module


def _real(student: StudentFile, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    array = student.tensors[name].astype(np.float32)
    if student.tensors[name].dtype == np.int8:
        array *= student.weight_scales[name.removesuffix(WEIGHT)][:, None]
    return array
