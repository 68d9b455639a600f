"""The lines of the runtimes, and the ONNX that each takes: `profiles/runtimes.toml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from profiles.record import Record
from profiles.toml_file import fit, read_toml

PATH = Path(__file__).parent / "runtimes.toml"

FloatType = Literal["float32", "float16", "bfloat16"]
AttentionForm = Literal["op", "matmul"]


class OnnxTarget(Record):
    """The ONNX that the device's parser takes."""

    opset: int = Field(ge=13)
    attention: AttentionForm = Field(description="'op': the Attention operator; 'matmul': MatMul, Softmax, MatMul.")
    float_type: FloatType = Field(description="The type of everything that is not quantized.")
    source: str


class RuntimeLine(Record):
    """A line of releases of one runtime."""

    runtime: Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
    version: str
    onnx: OnnxTarget


class RuntimeLines(Record):
    """The file."""

    lines: dict[str, RuntimeLine]


@cache
def load_runtime_lines() -> dict[str, RuntimeLine]:
    """Return the lines that are shipped, by names such as `tensorrt-11`, each runtime's newest last."""
    return fit(RuntimeLines, {"lines": read_toml(PATH)}, PATH).lines
