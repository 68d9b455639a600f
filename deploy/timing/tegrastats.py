"""Clocks, temperature, power and memory of a Jetson, as one line of `tegrastats` tells them.

    RAM 3456/15388MB (lfb 20x4MB) … GR3D_FREQ 0%@[306] … gpu@51C tj@53.5C … VDD_IN 5000mW/5000mW

Rails and sensors have other names on each module; they are kept as they are called. Not proven: no Jetson has answered
it. The parsing is tested on lines that others published. The line's fields are described in NVIDIA's Jetson Linux
Developer Guide, "tegrastats Utility".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from profiles.errors import GpusqError

_DEVFREQ = Path("/sys/class/devfreq")
_RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
_GPU = re.compile(r"\bGR3D_FREQ (\d+)%(?:@\[?(\d+))?")
_EMC = re.compile(r"\bEMC_FREQ (\d+)%(?:@(\d+))?")
_TEMPERATURE = re.compile(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b")
_POWER = re.compile(r"\b(\w+) (\d+)(?:mW)?/(\d+)(?:mW)?(?= |$)")
_ABSENT = -100.0  # a sensor that is switched off says −256


@dataclass(frozen=True)
class JetsonState:
    """A Jetson at one moment.

    Attributes:
        ram_mb: used and in all.
        gpu_load: a share.
        gpu_mhz: of the first GPC; None where only the load is told, as without root.
        emc_mhz: the memory's clock; None likewise.
        temperatures_c: by sensor.
        power_mw: what each rail draws now, by name.
    """

    ram_mb: tuple[int, int]
    gpu_load: float
    gpu_mhz: int | None
    emc_mhz: int | None
    temperatures_c: dict[str, float]
    power_mw: dict[str, int]


def parse_line(line: str) -> JetsonState:
    """The state in one line of tegrastats.

    Raises:
        GpusqError: it is none.
    """
    ram, gpu = _RAM.search(line), _GPU.search(line)
    if ram is None or gpu is None:
        raise GpusqError(f"this is no line of tegrastats: {line}", hint="please report the release of Jetson Linux")
    emc = _EMC.search(line)
    return JetsonState(
        ram_mb=(int(ram[1]), int(ram[2])),
        gpu_load=int(gpu[1]) / 100,
        gpu_mhz=int(gpu[2]) if gpu[2] else None,
        emc_mhz=int(emc[2]) if emc and emc[2] else None,
        temperatures_c={name: float(text) for name, text in _TEMPERATURE.findall(line) if float(text) > _ABSENT},
        power_mw={name: int(now) for name, now, _ in _POWER.findall(line) if not name.startswith(("RAM", "SWAP"))},
    )


def clocks_are_locked(devfreq: Path = _DEVFREQ) -> bool | None:
    """Whether the GPU's clock is held at its highest, as `jetson_clocks` does it; None where no GPU is found.

    jetson_clocks writes the highest frequency as the lowest one that is allowed.
    """
    for folder in sorted(devfreq.glob("*")):
        if re.search(r"gpu|gv11b|ga10b", folder.name):
            return _word(folder / "min_freq") == _word(folder / "max_freq") != ""
    return None


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
