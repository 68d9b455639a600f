"""Programs of NVIDIA's names stand in, which print what others recorded."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from deploy.timing import gpu_conditions
from deploy.timing.gpu_conditions import Reading, conditions_of, other_processes, watching

SMI = """#!/bin/sh
case "$*" in
  *--query-compute-apps*) echo "$PPID, python"; echo "1, /usr/bin/game"; echo "999999999, elsewhere";;
  *) while :; do echo "{line}"; sleep 0.01; done;;
esac
"""
COOL = "0x0000000000000000, 1410, 1410, 250.5, 61"
HOT = "0x0000000000000040, 1095, 1410, 270.0, 92"
TEGRASTATS = """#!/bin/sh
while :; do echo "RAM 3456/15388MB (lfb 20x4MB) GR3D_FREQ 99%@[1300] gpu@51C VDD_IN 25000mW/24000mW"; sleep 0.01; done
"""


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def readings_within(seconds: float) -> list[Reading]:
    with watching() as readings:
        end = time.monotonic() + seconds
        while len(readings) < 3 and time.monotonic() < end:
            time.sleep(0.01)
    return readings


def test_reads_the_gpu_while_the_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", SMI.format(line=COOL), monkeypatch)
    found = conditions_of(readings_within(20))
    assert (found.mhz, found.temperature_c, found.power_w) == (1410, 61, 250.5)
    assert found.readings >= 3
    assert found.throttled_by == ()


def test_heat_and_other_processes_break_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of this test is its own, and one that this host does not have is another container's."""
    program(tmp_path, "nvidia-smi", SMI.format(line=HOT), monkeypatch)
    found = conditions_of(readings_within(20))
    assert list(found.broken()) == [
        "the GPU was throttled by heat, by the hardware",
        "other processes used the GPU: /usr/bin/game",
    ]
    assert other_processes() == ("/usr/bin/game",)


def test_reads_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "tegrastats", TEGRASTATS, monkeypatch)
    monkeypatch.setattr(gpu_conditions, "jetson", lambda: "NVIDIA Jetson AGX Orin")
    monkeypatch.setattr(gpu_conditions, "clocks_are_locked", lambda: False)
    found = conditions_of(readings_within(20))
    assert (found.mhz, found.temperature_c, found.power_w) == (1300, 51, 25.0)
    assert list(found.broken()) == []
    assert list(found.notes()) == ["the clocks are not locked: run `sudo jetson_clocks` before"]


def test_a_jetson_whose_clock_falls_was_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_conditions, "jetson", lambda: "NVIDIA Jetson AGX Orin")
    steady, falling = [Reading(1300, 50, 25)] * 20, [Reading(900, 80, 25)] * 2
    assert conditions_of(steady).throttled_by == ()
    assert conditions_of(steady + falling).throttled_by == ("something: its clock fell from 1300 to 900 MHz",)


def test_without_a_program_nothing_is_known_and_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watching() as readings:
        pass
    found = conditions_of(readings)
    assert (found.readings, found.power_w) == (0, None)
    assert list(found.notes()) == ["the host does not tell the GPU's clocks, temperature and power"]
