"""Clocks, temperature, power and throttling of an NVIDIA GPU of an x86 host, as `nvidia-smi` tells them.

It asks NVML, so no package of its own is needed. Not proven: no GPU has answered it. The parsing is tested on text that
others recorded. A Jetson before JetPack 7 has no nvidia-smi; see `deploy.timing.tegrastats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from profiles.errors import GpusqError

# `clocks_event_reasons.active` is its newer name; drivers that have that one still take this one.
FIELDS = ("clocks_throttle_reasons.active", "clocks.sm", "clocks.max.sm", "power.draw", "temperature.gpu")
# nvmlClocksThrottleReasons (NVML API reference); an idle GPU and clocks that a user has set are no throttling.
_REASONS = {
    0x004: "the power limit",
    0x008: "a hardware slowdown",
    0x020: "heat, by the driver",
    0x040: "heat, by the hardware",
    0x080: "the power brake",
}


@dataclass(frozen=True)
class GpuState:
    """A GPU at one moment; None is what it does not tell.

    Attributes:
        throttled_by: why its clocks are below what was asked for, in words.
        sm_mhz: its SM clock.
        max_sm_mhz: the highest that it has.
        power_w: what it draws.
        temperature_c: of the GPU.
    """

    throttled_by: tuple[str, ...]
    sm_mhz: float | None
    max_sm_mhz: float | None
    power_w: float | None
    temperature_c: float | None


def parse_states(text: str) -> tuple[GpuState, ...]:
    """The GPUs in what `nvidia-smi --query-gpu=FIELDS --format=csv,noheader,nounits` printed, by PCI bus.

    Raises:
        GpusqError: a line is not understood.
    """
    return tuple(_state(line) for line in text.splitlines() if line.strip())


def _state(line: str) -> GpuState:
    mask, *rest = (cell.strip() for cell in line.split(","))
    try:
        reasons = tuple(_reasons(int(mask, 16)))
        clock, most, power, temperature = (_number(cell) for cell in rest)
    except ValueError:
        raise GpusqError(f"nvidia-smi's answer is not understood: {line}", hint="please report its version") from None
    return GpuState(reasons, clock, most, power, temperature)


def _reasons(mask: int) -> Iterator[str]:
    return (why for bit, why in _REASONS.items() if mask & bit)


def _number(cell: str) -> float | None:
    return None if cell.startswith(("[N/A", "N/A", "[Not Supported")) else float(cell.split()[0])
