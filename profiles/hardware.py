"""The figures of one product: its GPU, memory, DLA cores and power modes, each with where it was published."""

from __future__ import annotations

from pydantic import Field

from profiles.rates import Rates
from profiles.record import Record


class Gpu(Record):
    """The GPU: its SMs, clocks and caches."""

    sms: int = Field(gt=0, description="Streaming multiprocessors that are on; a TPC has two.")
    boost_clock_mhz: float = Field(gt=0, description="The clock that the published rates are stated at.")
    tensor_clock_mhz: float | None = Field(
        default=None, gt=0, description="That of the tensor cores' rates, where it is another."
    )
    base_clock_mhz: float | None = Field(default=None, gt=0)
    fp32_accumulate: float = Field(
        default=1.0, gt=0, le=1, description="Part of the tensor cores' full rate that FP32 accumulators leave."
    )
    l2_mib: float | None = Field(default=None, gt=0)
    power_w: float | None = Field(default=None, gt=0, description="Largest power of the board or the module.")
    source: str


class Memory(Record):
    """The memory: bandwidth = bus × data rate."""

    size_gb: float = Field(gt=0, description="As it is sold; a Jetson shares it with the CPU.")
    kind: str
    bus_bits: int = Field(gt=0)
    data_rate_mbps: float = Field(gt=0, description="Mbit/s of each pin: twice the clock of HBM and LPDDR.")
    bandwidth_gb_s: float = Field(gt=0, description="10⁹ bytes a second.")
    source: str


class Dla(Record):
    """The deep-learning accelerators beside the GPU."""

    clocks_mhz: tuple[float, ...] = Field(description="The largest clock of each core.")
    published_sparse_int8_tops: float = Field(gt=0, description="Of all cores together.")
    source: str


class PublishedRates(Record):
    """Rates as the vendor prints them, in TFLOPS or TOPS: a check on the computed ones."""

    dense: Rates = Rates()
    sparse: Rates = Rates()
    source: str


class PowerMode(Record):
    """One mode of nvpmodel, as its configuration limits the module."""

    name: str = Field(description="As `nvpmodel -q` prints it, without `MODE_`.")
    tpcs: int = Field(gt=0, description="GPU units of two SMs that are on.")
    gpu_clock_mhz: float = Field(gt=0)
    emc_clock_mhz: float = Field(gt=0, description="Clock of the memory controller; data come at twice that.")
    cpu_cores: int = Field(gt=0)
    cpu_clock_mhz: float = Field(gt=0)
    dla_clocks_mhz: tuple[float, ...] = ()


class PowerModes(Record):
    """The modes of a module, the one of its `[gpu]` figures first."""

    modes: tuple[PowerMode, ...] = Field(min_length=1)
    source: str
