"""Peak rates of arithmetic, by number type.

    rate (TFLOPS or TOPS) = SMs × operations per clock and SM × clock (MHz) / 10⁶

A multiply-add is two operations. `fp32` runs on the FP32 cores, everything else on the tensor cores, which may have a
boost clock of their own. 2:4 doubles the rate where the architecture has it. A product that computes with FP32
accumulators at a lower rate (a GeForce: a half) has that factor in `tf32`, `bf16`, `fp16` and `fp8`; `fp16_acc16` and
`fp8_acc16` are the same operands with FP16 accumulators. FP4 and the integers have no such factor.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from profiles.record import Record

NUMBER_TYPES = ("fp32", "tf32", "fp16", "fp16_acc16", "bf16", "int8", "int4", "fp8", "fp8_acc16", "fp4")
FP32_ACCUMULATORS = frozenset({"tf32", "fp16", "bf16", "fp8"})
SPARSE_FACTOR = 2


class Rates(Record):
    """One figure for each number type; None where there is none."""

    fp32: float | None = Field(default=None, gt=0, description="On the FP32 cores, not the tensor cores.")
    tf32: float | None = Field(default=None, gt=0)
    fp16: float | None = Field(default=None, gt=0, description="With FP32 accumulators.")
    fp16_acc16: float | None = Field(default=None, gt=0, description="With FP16 accumulators.")
    bf16: float | None = Field(default=None, gt=0)
    int8: float | None = Field(default=None, gt=0)
    int4: float | None = Field(default=None, gt=0)
    fp8: float | None = Field(default=None, gt=0, description="With FP32 accumulators.")
    fp8_acc16: float | None = Field(default=None, gt=0, description="With FP16 accumulators.")
    fp4: float | None = Field(default=None, gt=0, description="NVFP4 and MXFP4.")

    def known(self) -> dict[str, float]:
        """The figures that there are, by number type."""
        return {kind: value for kind in NUMBER_TYPES if (value := getattr(self, kind)) is not None}


@dataclass(frozen=True)
class PeakRates:
    """What a device can reach at most, in TFLOPS or TOPS."""

    dense: Rates
    sparse: Rates


def peak_rates(
    per_clock: Rates,
    sparse_types: tuple[str, ...],
    *,
    sms: int,
    clock_mhz: float,
    tensor_clock_mhz: float,
    fp32_accumulate: float,
) -> PeakRates:
    """Return the peak rates of a GPU with `sms` SMs.

    Args:
        per_clock: operations per clock and SM at full rate.
        sparse_types: the number types that 2:4 makes faster.
        sms: how many SMs are on.
        clock_mhz: clock of the FP32 cores.
        tensor_clock_mhz: clock of the tensor cores.
        fp32_accumulate: part of the full rate that is left with FP32 accumulators.
    """
    dense: dict[str, float] = {}
    for kind, operations in per_clock.known().items():
        share = fp32_accumulate if kind in FP32_ACCUMULATORS else 1.0
        clock = clock_mhz if kind == "fp32" else tensor_clock_mhz
        dense[kind] = sms * operations * share * clock / 1e6
    sparse = {kind: SPARSE_FACTOR * rate for kind, rate in dense.items() if kind in sparse_types}
    return PeakRates(Rates(**dense), Rates(**sparse))
