from __future__ import annotations

import pytest

from profiles.device import Device, list_devices, load_device
from profiles.errors import GpusqError

WITH_MODES = {device.name: device for device in list_devices() if device.power is not None}


def test_the_jetsons_have_power_modes() -> None:
    assert set(WITH_MODES) == {
        "agx-orin-32gb", "agx-orin-64gb", "orin-nano-super-8gb", "orin-nx-16gb", "thor-t5000",
    }  # fmt: skip


@pytest.mark.parametrize("name", WITH_MODES)
def test_the_first_mode_is_that_of_the_figures(name: str) -> None:
    device = WITH_MODES[name]
    assert device.power is not None
    assert device.gpu is not None
    assert device.memory is not None
    first = device.power.modes[0]
    assert (first.name, 2 * first.tpcs, first.gpu_clock_mhz) == (
        device.power_mode,
        device.gpu.sms,
        device.gpu.boost_clock_mhz,
    )
    assert 2 * first.emc_clock_mhz == device.memory.data_rate_mbps
    assert first.dla_clocks_mhz == (device.dla.clocks_mhz if device.dla else ())


@pytest.mark.parametrize("name", WITH_MODES)
def test_no_mode_exceeds_the_largest(name: str) -> None:
    device = WITH_MODES[name]
    assert device.power is not None
    rates = [device.at(mode.name).rates for mode in device.power.modes]
    largest = max(found.dense.fp16 or 0 for found in rates if found)
    super_mode = "MAXN_SUPER" if any(mode.name == "MAXN_SUPER" for mode in device.power.modes) else "MAXN"
    unlimited = device.at(super_mode).rates
    assert unlimited is not None
    assert unlimited.dense.fp16 == largest


def test_a_mode_changes_sms_clocks_bandwidth_dla_and_rates() -> None:
    device = load_device("agx-orin").at("15W")
    assert device.gpu is not None
    assert device.memory is not None
    assert device.dla is not None
    assert device.rates is not None
    assert (device.power_mode, device.gpu.sms, device.gpu.boost_clock_mhz) == ("15W", 6, 408)
    assert device.memory.bandwidth_gb_s == pytest.approx(256 / 8 * 2 * 2.133)
    assert device.dla.clocks_mhz == (614.4, 614.4)
    assert device.rates.dense.int8 == pytest.approx(6 * 4096 * 408e6 / 1e12)
    assert device.published is None  # what is printed is MAXN's


def test_a_mode_leaves_the_rest_and_can_be_left_again() -> None:
    device = load_device("agx-orin")
    changed = {"power_mode", "gpu", "memory", "dla", "published"}
    before, after = device.model_dump(exclude=changed), device.at("30W").model_dump(exclude=changed)
    assert before == after
    again = device.at("30W").at("MAXN")
    assert (again.gpu, again.memory, again.dla) == (device.gpu, device.memory, device.dla)
    assert device.at("MAXN") is device


@pytest.mark.parametrize("asked", ["30W", "30w", "MODE_30W", "mode_30w"])
def test_modes_are_known_as_nvpmodel_prints_them(asked: str) -> None:
    assert load_device("agx-orin").at(asked).power_mode == "30W"


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("agx-orin", "40W", "agx-orin-64gb has no power mode '40W'; it has MAXN, 50W, 30W, 15W"),
        ("a100", "MAXN", "a100-sxm-80gb has no power modes, so no 'MAXN'"),
    ],
)
def test_an_unknown_mode_is_an_error_that_lists_those_there_are(device: str, asked: str, message: str) -> None:
    with pytest.raises(GpusqError) as caught:
        load_device(device).at(asked)
    assert caught.value.message == message
    assert caught.value.hint


def test_a_device_without_figures_still_has_its_modes() -> None:
    bare = Device.model_validate({**load_device("agx-orin").model_dump(), "gpu": None, "memory": None, "dla": None})
    assert bare.at("30W").power_mode == "30W"
    assert bare.rates is None
    assert bare.dla_int8_tops is None
