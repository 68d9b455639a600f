"""The conditions under which a CPU was timed, and which of them were broken.

| condition | read from | broken if |
|---|---|---|
| load of others | /proc/stat less this process's own time | other processes used more than 10 % of the cores |
| stolen time | /proc/stat | the hypervisor gave more than 1 % of the time to others |
| throttling | sysfs, thermal_throttle/core_throttle_count | a core was throttled in between |
| governor | sysfs, cpufreq/scaling_governor | never: a governor other than `performance` is a note |

What a host does not tell is a note as well, never silence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from profiles.record import Record

MOST_LOAD_OF_OTHERS = 0.10
MOST_STOLEN = 0.01
_STAT = Path("/proc/stat")
_CPUS = Path("/sys/devices/system/cpu")
# proc(5): user nice system idle iowait irq softirq steal; guest time is in user already.
_IDLE = (3, 4)
_STEAL = 7


class Conditions(Record):
    """What was read while engines were timed; shares are of all cores of this process."""

    load_of_others: float
    stolen: float
    throttled: int | None
    governor: str | None
    notes: tuple[str, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What the host says at one moment; times in seconds, summed over all cores."""

    wall_s: float
    busy_s: float
    stolen_s: float
    own_s: float
    cores: int
    throttled: int | None
    governor: str | None


def read() -> Reading:
    """Read the host as it is now."""
    own = os.times()
    busy, stolen = parse_stat(_STAT.read_text(encoding="ascii"), os.sysconf("SC_CLK_TCK"))
    return Reading(
        wall_s=time.monotonic(),
        busy_s=busy,
        stolen_s=stolen,
        own_s=own.user + own.system + own.children_user + own.children_system,
        cores=os.cpu_count() or 1,
        throttled=_throttled(),
        governor=_governor(),
    )


def parse_stat(text: str, ticks_per_second: int) -> tuple[float, float]:
    """Seconds that all cores were busy, and that were stolen, from the first line of /proc/stat."""
    ticks = [int(word) for word in text.splitlines()[0].split()[1:9]]
    stolen = ticks[_STEAL] if len(ticks) > _STEAL else 0
    busy = sum(ticks) - sum(ticks[index] for index in _IDLE) - stolen
    return busy / ticks_per_second, stolen / ticks_per_second


def between(start: Reading, end: Reading) -> Conditions:
    """The conditions between two readings."""
    capacity = max(end.wall_s - start.wall_s, 1e-9) * end.cores
    others = max(0.0, (end.busy_s - start.busy_s) - (end.own_s - start.own_s)) / capacity
    stolen = (end.stolen_s - start.stolen_s) / capacity
    throttled = None if end.throttled is None or start.throttled is None else end.throttled - start.throttled
    return Conditions(
        load_of_others=others,
        stolen=stolen,
        throttled=throttled,
        governor=end.governor,
        notes=tuple(_notes(end)),
        broken=tuple(_broken(others, stolen, throttled)),
    )


def _broken(others: float, stolen: float, throttled: int | None) -> Iterator[str]:
    if others > MOST_LOAD_OF_OTHERS:
        yield f"other processes used {100 * others:.0f} % of the cores"
    if stolen > MOST_STOLEN:
        yield f"the hypervisor took {100 * stolen:.1f} % of the time"
    if throttled:
        yield f"the cores were throttled {throttled} times"


def _notes(end: Reading) -> Iterator[str]:
    if end.governor is None:
        yield "the host does not tell the CPU's governor"
    elif end.governor != "performance":
        yield f"the CPU's governor is {end.governor}, not performance"
    if end.throttled is None:
        yield "the host does not tell whether the CPU was throttled"


def _governor() -> str | None:
    names = {text for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor") if (text := _word(path))}
    return " and ".join(sorted(names)) or None


def _throttled() -> int | None:
    counts = [_word(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    known = [int(count) for count in counts if count.isdigit()]
    return sum(known) if known else None


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
