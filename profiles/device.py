"""A device as data: one TOML file per device, read into a strict model.

`load_device("a100")` takes a file's stem, one of its aliases, or the path of a user's own file. An unknown key, a
missing figure and a misspelt name are each one error that names the file and the key.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from profiles.errors import GpusqError
from profiles.record import Record, first_problem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEVICES_DIR = Path(__file__).parent / "devices"

Runtime = Literal["tensorrt", "onnxruntime"]
FloatType = Literal["float32", "float16", "bfloat16"]
AttentionForm = Literal["op", "matmul"]

_BFLOAT16_FROM = 8.0


class AheadOfTime(Record):
    """The TensorRT-RTX target that compiles for this device on a machine without a GPU."""

    compute_capability: str = Field(pattern=r"^SM\d+$")
    nearest: bool = Field(
        description="True where the compiler does not know the device and takes its nearest relative."
    )
    source: str


class SparseKernels(Record):
    """The rules of the 2:4 kernels: what K must be a multiple of, and what the builder is reported to ask besides."""

    int8_k_multiple: int = Field(gt=0)
    float16_k_multiple: int = Field(gt=0)
    int8_wants_int8_output: bool = Field(description="Whether a sparse INT8 GEMM is chosen only if its output is INT8.")
    grouped_convolutions: bool = Field(default=False, description="Whether there are sparse kernels for them.")
    faster_convolution_channels: int | None = Field(
        default=None,
        gt=0,
        description="Input channels × kernel and output channels from which on sparse ones are faster.",
    )
    source: str


class OnnxTarget(Record):
    """The ONNX that the device's parser takes."""

    opset: int = Field(ge=13)
    attention: AttentionForm = Field(description="'op': the Attention operator; 'matmul': MatMul, Softmax, MatMul.")
    float_type: FloatType = Field(description="The type of everything that is not quantized.")
    source: str


class Device(Record):
    """One device profile; see `profiles/devices/*.toml`."""

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    runtime: Runtime
    runtime_version: str = Field(description="The line of the runtime that the device is shipped with.")
    compute_capability: str | None = None
    gpu_name: str | None = Field(default=None, description="Part of the name by which the driver calls the GPU.")
    onnx: OnnxTarget
    ahead_of_time: AheadOfTime | None = None
    sparse: SparseKernels | None = None

    @property
    def has_bfloat16(self) -> bool:
        """Whether its tensor cores take bfloat16: from compute capability 8.0 on (CUDA C++ programming guide, 17.2)."""
        return self.compute_capability is not None and float(self.compute_capability) >= _BFLOAT16_FROM


def load_device(name: str) -> Device:
    """Return the profile called `name`: a stem in `profiles/devices/`, an alias, or a path to a TOML file.

    Raises:
        GpusqError: there is no such profile (the nearest name is given), or the file does not fit the model.
    """
    if name.endswith(".toml"):
        return _read(Path(name))
    by_name = _names()
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        suggestion = f" (did you mean '{near[0]}'?)" if near else ""
        raise GpusqError(f"no device profile '{name}'{suggestion}", hint="`gpusq profiles` lists them")
    return by_name[name]


def list_devices() -> Iterator[Device]:
    """Yield every shipped profile, by name."""
    yield from (_read(path) for path in sorted(DEVICES_DIR.glob("*.toml")))


@cache
def _names() -> dict[str, Device]:
    return {name: device for device in list_devices() for name in (device.name, *device.aliases)}


def _read(path: Path) -> Device:
    if not path.is_file():
        raise GpusqError(f"no such file: {path}", hint="give the path of a device profile in TOML, or a profile's name")
    try:
        fields: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        if "name" in fields:
            raise GpusqError(f"{path}: name: a profile is called after its file", hint="remove the key, or use 'title'")
        return Device.model_validate_json(json.dumps({"name": path.stem, **fields}, default=str), strict=True)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GpusqError(f"{path} is not TOML: {error}", hint="compare it with `gpusq profiles a100 --json`") from None
    except ValidationError as error:
        raise GpusqError(f"{path}: {first_problem(error)}", hint="profiles/device.py describes each key") from None
