"""Programs of torch.export in .pt2 files, float or quantized by PT2E → a module that `to_onnx` exports.

A converted PT2E program holds quantize and dequantize operators between its layers, and its weights as integers:

    x ─► quantize ─► dequantize ─► linear          x ─► fc.input (Identity) ─► linear
                                     ▲         →                                ▲
    _frozen_param0 ─► dequantize ────┘             fc.weight, the integers · scale

with Place("fc.input", "output") and Place("fc", "weight") as quantizers. Layers keep the names that they had in the
module that was exported.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.program_archive import check_archive, restricted_unpickling
from exporters.quiet import quiet_loggers
from exporters.signature import DTYPES, Input, axis_name
from profiles.errors import GpusqError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Program:
    """A program and what it takes.

    Attributes:
        program: as torch.export.load gives it.
        inputs: in the order of its forward, with the axes that were dynamic when it was exported.
    """

    program: torch.export.ExportedProgram
    inputs: tuple[Input, ...]


def load_program(path: str | Path) -> Program:
    """Return the program in the .pt2 file `path`. Nothing of the file is executed.

    Raises:
        GpusqError: the file is missing, broken or from a newer torch, or loading it could run code.
    """
    path = Path(path)
    check_archive(path)
    import torch

    # Both register operators that quantized programs consist of; the first cannot fail.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    quiet = quiet_loggers("torch.export", "torch._export", level=logging.CRITICAL)  # what matters is raised
    with restricted_unpickling(), quiet, path.open("rb") as file:
        try:
            program = torch.export.load(file)
        except Exception as error:  # torch raises whatever it meets: KeyError, RuntimeError, AssertionError
            raise GpusqError(
                f"torch could not load {path}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                hint="export it again with the torch that is installed here; an operator of a library must be imported",
            ) from error
    _check_operators(path, program)
    return Program(program, _inputs(path, program))


def _check_operators(path: Path, program: torch.export.ExportedProgram) -> None:
    import torch

    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, str):
                raise GpusqError(
                    f"{path}: the operator {node.target} is not registered", hint="import the library that defines it"
                )


def _inputs(path: Path, program: torch.export.ExportedProgram) -> tuple[Input, ...]:
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(_input(path, name, placeholders[name]) for name in program.graph_signature.user_inputs if name)


def _input(path: Path, name: Any, value: Any) -> Input:
    dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    if dtype not in DTYPES:
        raise GpusqError(
            f"{path}: input {name!r} is {dtype}", hint=f"a program takes tensors of {', '.join(DTYPES)} only"
        )
    dynamic = {axis: axis_name(name, axis) for axis, dim in enumerate(value.shape) if not isinstance(dim, int)}
    shape = tuple(dim if isinstance(dim, int) else _hint(dim) for dim in value.shape)
    return Input(str(name), shape, dtype, dynamic)


def _hint(dim: Any) -> int:
    """The length that a dynamic axis had in the example; 2 where the file has forgotten it."""
    hint = getattr(dim.node, "hint", None)
    return int(hint) if isinstance(hint, int) else 2
