"""What the cost model needs to know of a device, in its own units: µs, bytes, operations.

The clock that a board holds under full tensor-core load is not its boost clock. An A100 PCIe falls to its base clock:
1,065 of 1,410 MHz are 0.755, which is what its best FP16 GEMM reaches of the peak; an H100 PCIe does the same. Base
clocks are a promise for the worst case, though, and some boards have none, so a board is also compared with a relative
of the same architecture that was measured:

    clock = clock of the relative × (power of a SM / that of the relative)^(1/3)

power growing with the clock times the voltage squared, and the voltage with the clock. The higher of the two counts. A
Jetson holds the clock of its power mode; nvpmodel has chosen it low enough.
"""

from __future__ import annotations

from dataclasses import dataclass

from profiles.device import Device, load_device
from profiles.errors import GpusqError
from profiles.rates import FP32_ACCUMULATORS

# By compute capability, the board of it that was measured.
_MEASURED = {"8.0": "a100-pcie-80gb", "8.6": "rtx-3090", "8.9": "rtx-4090", "9.0": "h100-pcie-80gb", "12.0": "rtx-5080"}


@dataclass(frozen=True)
class Machine:
    """A device in the units of the model.

    Attributes:
        name: the profile's.
        architecture: such as `sm80`.
        sms: streaming multiprocessors.
        clock: cycles a µs, at boost.
        bandwidth: bytes a µs of the memory.
        l2: bytes of the L2 cache.
        sustained: share of the boost clock that is held under full tensor-core load.
        dense: operations a µs by number type, at boost.
        sparse: the same of 2:4 kernels, the zeros counted.
        integrated: whether it shares its memory with a CPU: a Jetson.
        halved: number types whose rate this product halves, which leaves it power to hold the boost clock.
    """

    name: str
    architecture: str
    sms: int
    clock: float
    bandwidth: float
    l2: float
    sustained: float
    dense: dict[str, float]
    sparse: dict[str, float]
    halved: frozenset[str]
    integrated: bool = False


def machine_of(device: Device) -> Machine:
    """Return `device` for the cost model.

    Raises:
        GpusqError: its profile lacks a figure that the model needs; the message names the key.
    """
    rates = device.rates
    if device.gpu is None or device.memory is None or device.architecture is None or rates is None:
        lacking = "[gpu]" if device.gpu is None else "[memory]" if device.memory is None else "architecture"
        raise GpusqError(
            f"{device.name} has no {lacking} in its profile, so its latency cannot be predicted",
            hint="`gpusq profiles` lists the GPUs; `gpusq profiles a100 --json` shows every key",
        )
    if device.gpu.l2_mib is None:
        raise GpusqError(
            f"{device.name} has no gpu.l2_mib in its profile, so its latency cannot be predicted",
            hint="copy the profile, add the figure with its source, and give the file's path",
        )
    return Machine(
        name=device.name,
        architecture="sm" + device.architecture.compute_capability.replace(".", ""),
        sms=device.gpu.sms,
        clock=device.gpu.boost_clock_mhz,
        bandwidth=device.memory.bandwidth_gb_s * 1e3,
        l2=device.gpu.l2_mib * 2**20,
        sustained=sustained_share(device),
        dense={kind: rate * 1e6 for kind, rate in rates.dense.known().items()},
        sparse={kind: rate * 1e6 for kind, rate in rates.sparse.known().items()},
        halved=FP32_ACCUMULATORS if device.gpu.fp32_accumulate < 1 else frozenset(),
        integrated=device.power is not None,
    )


def sustained_share(device: Device) -> float:
    """Share of the boost clock that the tensor cores hold under full load: see the module."""
    gpu = device.gpu
    if gpu is None or device.power is not None:
        return 1.0
    boost = gpu.tensor_clock_mhz or gpu.boost_clock_mhz
    known = [clock for clock in (gpu.base_clock_mhz, _clock_by_power(device)) if clock is not None]
    return min(1.0, max(known) / boost) if known else 1.0


def _clock_by_power(device: Device) -> float | None:
    """The clock in MHz that the power of a SM allows; None where no relative tells."""
    measured = _MEASURED.get(device.compute_capability or "")
    gpu, other = device.gpu, None if measured is None else load_device(measured).gpu
    if gpu is None or other is None or not (gpu.power_w and other.power_w and other.base_clock_mhz):
        return None
    return float(other.base_clock_mhz * ((gpu.power_w / gpu.sms) / (other.power_w / other.sms)) ** (1 / 3))
