"""What the GPU of this host did while engines ran on it, and which conditions it broke.

    nvidia-smi -lms 100   or, on a Jetson,   tegrastats --interval 100   prints a line each 100 ms, in the background

| condition | read from | broken if |
|---|---|---|
| throttling | nvidia-smi's reasons | any but an idle GPU and clocks that a user set |
| falling clock | a Jetson tells no reasons | in 5 % of the readings it was below 90 % of the highest |
| other load | nvidia-smi's compute processes | another process uses the GPU |
| locked clocks | devfreq, as jetson_clocks sets it | never: a note if they are not |

No GPU has answered yet (docs/unproven.md); in the tests programs of these names print what was recorded elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import Field

from deploy.environment import jetson, power_mode
from deploy.timing.nvidia_smi import FIELDS, parse_states
from deploy.timing.tegrastats import clocks_are_locked, parse_line
from profiles.errors import GpusqError
from profiles.record import Record

INTERVAL_MS = 100
_FALLEN = 0.90
_OFTEN = 0.05
_BOARD = "VDD_IN"  # the rail of the whole module, of those that a Jetson names
_MW_PER_W = 1e3


class GpuConditions(Record):
    """What was read of a GPU while engines were timed; None is what it does not tell."""

    readings: int
    mhz: float | None = Field(description="The median clock of the SMs.")
    lowest_mhz: float | None
    temperature_c: float | None = Field(description="The highest of the GPU.")
    power_w: float | None = Field(description="The mean: of the board, or of a Jetson's whole module.")
    power_mode: str | None = Field(description="A Jetson's, as nvpmodel calls it.")
    clocks_locked: bool | None = Field(description="Whether a Jetson's clocks are held, as jetson_clocks does it.")
    throttled_by: tuple[str, ...]
    others: tuple[str, ...] = Field(description="Other processes on the GPU.")

    def broken(self) -> Iterator[str]:
        """The conditions that did not hold, in words."""
        if self.throttled_by:
            yield f"the GPU was throttled by {', '.join(self.throttled_by)}"
        if self.others:
            yield f"other processes used the GPU: {', '.join(self.others)}"

    def notes(self) -> Iterator[str]:
        """What is worth knowing, in words."""
        if not self.readings:
            yield "the host does not tell the GPU's clocks, temperature and power"
        if self.clocks_locked is False:
            yield "the clocks are not locked: run `sudo jetson_clocks` before"


@dataclass(frozen=True)
class Reading:
    """The GPU at one moment; None is what it does not tell."""

    mhz: float | None
    temperature_c: float | None
    power_w: float | None
    throttled_by: tuple[str, ...] = ()


@contextlib.contextmanager
def watching(gpu: bool = True) -> Iterator[list[Reading]]:
    """Read the GPU every 100 ms while the block runs; empty without a `gpu`, or where nothing can be asked."""
    readings: list[Reading] = []
    if not gpu:
        yield readings
        return
    parse, command = (_of_tegrastats, _tegrastats()) if jetson() else (_of_nvidia_smi, _nvidia_smi())
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield readings
        return
    with process:
        reader = threading.Thread(target=_keep, args=(process.stdout, parse, readings))
        reader.start()
        try:
            yield readings
        finally:
            process.terminate()
            reader.join()


def _keep(lines: IO[str], parse: Callable[[str], Reading], readings: list[Reading]) -> None:
    for line in lines:
        with contextlib.suppress(GpusqError):  # the first line of a starting program, or the last of a dying one
            readings.append(parse(line))


def _nvidia_smi() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query, every = f"--query-gpu={','.join(FIELDS)}", str(INTERVAL_MS)
    return ["nvidia-smi", "--format=csv,noheader,nounits", "-lms", every, query, f"--id={visible}"]


def _tegrastats() -> list[str]:
    return ["tegrastats", "--interval", str(INTERVAL_MS)]


def _of_nvidia_smi(line: str) -> Reading:
    for state in parse_states(line):
        return Reading(state.sm_mhz, state.temperature_c, state.power_w, state.throttled_by)
    raise GpusqError("an empty line", hint="it is passed by")


def _of_tegrastats(line: str) -> Reading:
    state = parse_line(line)
    temperatures = [value for name, value in state.temperatures_c.items() if name.lower() == "gpu"]
    power = state.power_mw.get(_BOARD)
    return Reading(state.gpu_mhz, max(temperatures, default=None), None if power is None else power / _MW_PER_W)


def conditions_of(readings: Sequence[Reading]) -> GpuConditions:
    """What the readings of one run come to."""
    clocks = np.array([each.mhz for each in readings if each.mhz])
    temperatures = [each.temperature_c for each in readings if each.temperature_c is not None]
    powers = [each.power_w for each in readings if each.power_w is not None]
    reasons = {reason for each in readings for reason in each.throttled_by}
    if jetson() and clocks.size and float(np.mean(clocks < _FALLEN * clocks.max())) > _OFTEN:
        reasons.add(f"something: its clock fell from {clocks.max():.0f} to {clocks.min():.0f} MHz")
    return GpuConditions(
        readings=len(readings),
        mhz=float(np.median(clocks)) if clocks.size else None,
        lowest_mhz=float(clocks.min()) if clocks.size else None,
        temperature_c=max(temperatures, default=None),
        power_w=float(np.mean(powers)) if powers else None,
        power_mode=power_mode() if jetson() else None,
        clocks_locked=clocks_are_locked() if jetson() else None,
        throttled_by=tuple(sorted(reasons)),
        others=() if jetson() else other_processes(),
    )


def other_processes() -> tuple[str, ...]:
    """Processes of this host, but this one, that compute on the GPU; a container sees only its own."""
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.split(", ", 1) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return tuple(row[1] for row in rows if len(row) == 2 and row[0].isdigit() and _is_another(int(row[0])))


def _is_another(process: int) -> bool:
    return process != os.getpid() and Path(f"/proc/{process}").exists()
