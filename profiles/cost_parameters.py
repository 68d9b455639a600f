"""The fitted figures of the cost model: `profiles/cost_model.toml`, which `python -m profiles.fit` writes.

Each has a physical meaning and a unit; none belongs to one model. Shares are looked up by `architecture.type` where
that architecture was measured, such as `sm80.int8`, and by the type alone everywhere else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from profiles.record import Record
from profiles.toml_file import fit, read_toml

PATH = Path(__file__).parent / "cost_model.toml"
_USUAL_SHARE = 0.9


class GemmParameters(Record):
    """Of matrix products."""

    feed_bytes_per_clock: dict[str, float] = Field(description="Bytes that a SM takes from L2 in a clock.")
    ramp_bytes: float = Field(description="What a tile costs besides its sum, as bytes of K.")
    bandwidth_share: float = Field(description="Share of the memory's bandwidth that a kernel gets.")
    l2_speedup: float = Field(description="How much faster than the memory the L2 cache is.")
    split_us: float = Field(description="A pass over partial sums, µs.")
    dense_share: dict[str, float] = Field(description="Share of the sustained peak that the best dense kernel keeps.")
    sparse_share: dict[str, float] = Field(description="The same of 2:4 kernels.")

    def share(self, architecture: str, number: str, *, sparse: bool) -> float:
        """The share of the peak, of that architecture if it was measured."""
        shares = self.sparse_share if sparse else self.dense_share
        return shares.get(f"{architecture}.{number}", shares.get(number, _USUAL_SHARE))


class KernelParameters(Record):
    """Of everything in a model, as TensorRT runs it in a CUDA graph."""

    launch_cycles: float = Field(description="From one kernel to the next, its own start and end, at boost clock.")
    start_us: float = Field(description="Once for each run of the model, µs.")
    int8_gain: float = Field(description="Share of the peak that INT8 kernels keep, beside float16's.")
    int8_power: float = Field(
        default=1.0, description="Power of tensor cores busy with INT8 beside those busy with float16."
    )
    sparse_gain: float = Field(description="Share of the doubled peak that 2:4 kernels keep, beside dense ones.")
    convolution_share: float = Field(description="A convolution's kernel beside a GEMM's.")
    attention_share: float = Field(description="Share of the sustained peak that a fused attention keeps.")
    jetson_share: float = Field(default=1.0, description="GEMMs and attentions on a Jetson beside those on a board.")
    pointwise_share: float = Field(description="Share of the memory's bandwidth that pointwise kernels get.")
    full_load: float = Field(
        default=0.6, description="Share of the time that tensor cores are busy when the clock is the sustained one."
    )


class SoftwareEffect(Record):
    """What a program that runs the engine adds to it; the prediction itself is of a CUDA graph."""

    start_us: float = Field(default=0.0, description="Once for each run, µs.")
    enqueue_us: float = Field(default=0.0, description="For each kernel, where none of them waits for the GPU, µs.")


class Uncertainty(Record):
    """Standard deviations of the logarithm of predicted / published, by what is known of the case."""

    gemm: float
    end_to_end: float
    speedup: float


class CostParameters(Record):
    """The file."""

    sustained: dict[str, float] = Field(default={}, description="Boards whose sustained share was fitted.")
    gemm: GemmParameters
    kernel: KernelParameters
    software: dict[str, SoftwareEffect] = Field(default={}, description="By the first word of the program's name.")
    uncertainty: Uncertainty


@cache
def load_parameters() -> CostParameters:
    """Return the figures that are shipped."""
    return fit(CostParameters, read_toml(PATH), PATH)
