from __future__ import annotations

import json

import pytest

from deploy.show_profiles import ShownProfiles, list_text, one_text, show_profiles
from profiles.device import Device, list_devices, load_device
from profiles.rates import NUMBER_TYPES


def test_the_table_fits_80_columns_and_cuts_nothing() -> None:
    text = list_text(show_profiles(list_devices()), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for device in list_devices():
        (row,) = [line for line in text.splitlines() if line.split(" ")[0] == device.name]
        assert f" {device.runtime}" in row
        if device.memory is not None:
            assert f" {device.compute_capability} " in row
            assert f" {device.memory.size_gb:g} GB" in row
        assert all(f"{alias} = {device.name}" in " ".join(text.split()) for alias in device.aliases)


def test_the_table_says_what_compiles_here() -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    text = list_text(show_profiles([load_device("a100"), load_device("agx-orin"), load_device("cpu")]))
    plans = {line.split()[0]: line.split()[-1] for line in text.splitlines()[1:4]}
    assert plans == {"a100-sxm-80gb": "SM80", "agx-orin-64gb": "~SM86", "cpu": "yes"}


def test_without_compilers_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.tensorrt_api.has_api", lambda runtime: False)
    shown = show_profiles([load_device("a100")])
    assert list_text(shown).splitlines()[1].split()[-1] == "-"
    assert "pip install tensorrt-rtx" in one_text(shown.profiles[0])


@pytest.mark.parametrize("device", [*list_devices()], ids=lambda device: device.name)
def test_one_profile_is_shown_with_its_figures_and_their_sources(device: Device) -> None:
    (shown,) = show_profiles([device]).profiles
    text = one_text(shown)
    flat = " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines() if "http" not in line)
    assert device.title in text
    assert device.onnx.source in flat
    for part in (device.gpu, device.memory, device.power, device.architecture):
        assert part is None or " ".join(part.source.split()) in flat
    if device.gpu is not None:
        assert f"{device.gpu.sms} SMs at {device.gpu.boost_clock_mhz:g} MHz" in text
    for mode in device.power.modes if device.power else ():
        assert f"\n{mode.name} " in text


def test_json_has_what_a_machine_needs() -> None:
    found = json.loads(show_profiles([load_device("agx-orin")]).to_json())
    assert found["schema"] == 1
    (profile,) = found["profiles"]
    assert {
        "name", "title", "aliases", "compute_capability", "gpu_name", "runtime", "runtime_version", "runtimes", "onnx",
        "architecture", "gpu", "memory", "dla", "published", "power", "power_mode", "sparse", "ahead_of_time",
        "peak_rates", "dla_int8_dense_tops", "compiled_here_as", "host",
    } == set(profile)  # fmt: skip
    assert set(profile["peak_rates"]["dense"]) == set(NUMBER_TYPES)
    assert profile["peak_rates"]["dense"]["int8"] == pytest.approx(16 * 4096 * 1300.5e6 / 1e12)
    assert profile["dla_int8_dense_tops"] == pytest.approx(52.4, abs=0.1)
    assert ShownProfiles.model_validate(found).profiles[0].name == "agx-orin-64gb"


def test_the_cpu_is_read_from_this_host() -> None:
    (shown,) = show_profiles([load_device("cpu")]).profiles
    assert shown.host is not None
    assert int(shown.host["cores"]) >= 1
    assert shown.host["processor"] in one_text(shown)
    assert (shown.gpu, shown.peak_rates, shown.memory) == (None, None, None)


def test_a_power_mode_shows_its_own_rates() -> None:
    (shown,) = show_profiles([load_device("agx-orin").at("30W")]).profiles
    text = one_text(shown)
    assert "8 SMs at 612 MHz" in text
    assert "published" not in next(line for line in text.splitlines() if line.startswith("TFLOPS"))
