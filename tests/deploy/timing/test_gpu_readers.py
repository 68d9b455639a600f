"""Text that others recorded on their devices and published; no GPU answers here."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.timing.nvidia_smi import GpuState, parse_states
from deploy.timing.tegrastats import clocks_are_locked, parse_line
from profiles.errors import GpusqError

# An H100 at its power limit, from a public guide to throttling; units as --format=csv prints them.
H100 = "0x0000000000000004, 1590 MHz, 1980 MHz, 699.8 W, 71"
# From public repositories' tests and documentation of tegrastats.
XAVIER = (
    "RAM 2690/6854MB (lfb 6x1MB) SWAP 479/3427MB (cached 3MB) CPU [3%@1904,7%@1906,1%@1905,0%@1907,off,off] "
    "EMC_FREQ 0%@1600 GR3D_FREQ 0%@[510] VIC_FREQ 601 APE 150 AUX@39C CPU@39.5C AO@37.5C GPU@37.5C PMIC@50C "
    "VDD_IN 5079mW/5079mW VDD_CPU_GPU_CV 696mW/696mW VDD_SOC 1104mW/1104mW"
)
ORIN_NX = (
    "RAM 3456/15388MB (lfb 20x4MB) SWAP 0/7694MB (cached 0MB) CPU [12%@1420,8%@1420,off,off,5%@1420,3%@1420,2%@1420,"
    "1%@1420] EMC_FREQ 24%@2133 GR3D_FREQ 0%@[306] cpu@52.5C soc2@50C soc0@50C gpu@51C tj@53.5C soc1@50C "
    "VDD_IN 5000mW/5000mW"
)
WITHOUT_ROOT = (
    "RAM 1766/3964MB (lfb 197x4MB) SWAP 0/2048MB (cached 0MB) CPU [24%@1224,15%@1224,13%@1224,10%@1224] EMC_FREQ 0% "
    "GR3D_FREQ 0% PLL@21C CPU@25C PMIC@100C GPU@23.5C AO@33.5C thermal@24.5C POM_5V_IN 2545/2547 POM_5V_GPU 0/0 "
    "POM_5V_CPU 549/529"
)


def test_reads_a_gpu_at_its_power_limit() -> None:
    assert parse_states(H100 + "\n") == (GpuState(("the power limit",), 1590, 1980, 699.8, 71),)


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [("0x0", ()), ("0x0000000000000001", ()), ("0x0000000000000060", ("heat, by the driver", "heat, by the hardware"))],
)
def test_an_idle_gpu_is_not_throttled_and_a_hot_one_is(mask: str, reasons: tuple[str, ...]) -> None:
    (state,) = parse_states(f"{mask}, 210, 1410, [N/A], 34")
    assert state.throttled_by == reasons
    assert state.power_w is None


def test_reads_several_gpus_and_refuses_what_it_does_not_know() -> None:
    assert len(parse_states(f"{H100}\n{H100}\n")) == 2
    for wrong in ("No devices were found", "0x1, 1", "0x1, fast, 1, 1, 1"):
        with pytest.raises(GpusqError, match="not understood"):
            parse_states(wrong)


def test_reads_a_xavier() -> None:
    state = parse_line(XAVIER)
    assert (state.ram_mb, state.gpu_load, state.gpu_mhz, state.emc_mhz) == ((2690, 6854), 0, 510, 1600)
    assert state.temperatures_c == {"AUX": 39, "CPU": 39.5, "AO": 37.5, "GPU": 37.5, "PMIC": 50}
    assert state.power_mw == {"VDD_IN": 5079, "VDD_CPU_GPU_CV": 696, "VDD_SOC": 1104}


def test_reads_an_orin() -> None:
    state = parse_line(ORIN_NX)
    assert state.temperatures_c["tj"] == 53.5
    assert state.power_mw == {"VDD_IN": 5000}


def test_reads_a_line_without_clocks_and_units() -> None:
    state = parse_line(WITHOUT_ROOT)
    assert (state.gpu_mhz, state.emc_mhz) == (None, None)
    assert state.power_mw == {"POM_5V_IN": 2545, "POM_5V_GPU": 0, "POM_5V_CPU": 549}


def test_refuses_another_line() -> None:
    with pytest.raises(GpusqError, match="no line of tegrastats"):
        parse_line("tegrastats: command not found")


@pytest.mark.parametrize(("lowest", "locked"), [("1300500000", True), ("306000000", False)])
def test_sees_whether_jetson_clocks_holds_the_clock(tmp_path: Path, lowest: str, locked: bool) -> None:
    gpu = tmp_path / "17000000.gpu"
    gpu.mkdir()
    (gpu / "min_freq").write_text(f"{lowest}\n")
    (gpu / "max_freq").write_text("1300500000\n")
    assert clocks_are_locked(tmp_path) is locked
    assert clocks_are_locked(tmp_path / "none") is None
