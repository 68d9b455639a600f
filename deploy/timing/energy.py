"""Energy of an inference: an engine is called without a pause, and what the device drew meanwhile is divided.

| device | read from | of what |
|---|---|---|
| CPU | the counters of RAPL in /sys/class/powercap, which only root may read | all processor packages |
| GPU | the mean of `deploy.timing.gpu_conditions`' power, times the time | the board, or a Jetson's module |
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from deploy.timing.engine import Timed
from deploy.timing.gpu_conditions import watching

_POWERCAP = Path("/sys/class/powercap")
_UJ_PER_J = 1e6


def joules_per_call(engine: Timed, seconds: float, *, on_gpu: bool) -> float | None:
    """Joules that one call of `engine` takes, everything else on the device included; None where it is not told."""
    return _of_gpu(engine, seconds) if on_gpu else _of_cpu(engine, seconds)


def _of_gpu(engine: Timed, seconds: float) -> float | None:
    start = time.perf_counter()
    with watching() as readings:
        calls = _call(engine, seconds)
    took = time.perf_counter() - start
    powers = [each.power_w for each in readings if each.power_w is not None]
    return float(np.mean(powers)) * took / calls if powers else None


def _of_cpu(engine: Timed, seconds: float) -> float | None:
    before = counters()
    if not before:
        return None
    calls, after = _call(engine, seconds), counters()
    spent = sum(_difference(name, before[name], after[name]) for name in before)
    return spent / calls


def _call(engine: Timed, seconds: float) -> int:
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or not calls:
        engine.call()
        calls += 1
    return calls


def counters(root: Path = _POWERCAP) -> dict[Path, float]:
    """What each processor package has used so far, in joules; empty where it cannot be read."""
    try:
        return {zone: int((zone / "energy_uj").read_text()) / _UJ_PER_J for zone in root.glob("intel-rapl:?")}
    except (OSError, ValueError):
        return {}


def _difference(zone: Path, before: float, after: float) -> float:
    """Joules between two readings of a counter that begins anew at its end."""
    whole = int((zone / "max_energy_range_uj").read_text()) / _UJ_PER_J
    return (after - before) % whole
