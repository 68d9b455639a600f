"""What all GPUs of one compute capability share: `profiles/architectures.toml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from profiles.rates import Rates
from profiles.record import Record
from profiles.toml_file import fit, read_toml

PATH = Path(__file__).parent / "architectures.toml"

SparseType = Literal["tf32", "fp16", "fp16_acc16", "bf16", "int8", "int4", "fp8", "fp8_acc16", "fp4"]
CompilerLack = Literal["int8-convolution", "float32-gemm"]


class AheadOfTime(Record):
    """The TensorRT-RTX target that compiles for this device on a machine without a GPU."""

    compute_capability: str = Field(pattern=r"^SM\d+$")
    nearest: bool = Field(
        description="True where the compiler does not know the device and takes its nearest relative."
    )
    lacks: tuple[CompilerLack, ...] = Field(
        default=(),
        description="What the compiler has no kernels for at this target; TensorRT on the device may have them.",
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


class Architecture(Record):
    """An architecture; rates are operations per clock and SM, a multiply-add counted as two."""

    title: str
    compute_capability: str
    per_clock: Rates = Field(description="Dense, at full rate, whatever the accumulator.")
    sparse_types: tuple[SparseType, ...] = Field(description="The number types that 2:4 makes twice as fast.")
    shared_memory_kib: int = Field(gt=0, description="Largest shared memory of a SM.")
    dla_int8_per_clock: int | None = Field(
        default=None, gt=0, description="Dense INT8 operations per clock and DLA core."
    )
    ahead_of_time: AheadOfTime | None = None
    source: str


class Architectures(Record):
    """The file."""

    sparse_kernels: SparseKernels
    architectures: dict[str, Architecture]


@cache
def load_architectures() -> Architectures:
    """Return the architectures that are shipped, by names such as `sm80`."""
    return fit(Architectures, read_toml(PATH), PATH)
