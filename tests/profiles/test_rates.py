"""The figures of the shipped profiles against physics."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.device import Device, list_devices
from profiles.rates import FP32_ACCUMULATORS, NUMBER_TYPES, Rates, peak_rates

DEVICES = {device.name: device for device in list_devices()}
GPUS = {name: device for name, device in DEVICES.items() if device.gpu is not None}
# Vendors print two or three digits of a rate.
ROUNDING = 0.013
ROUGHER = {("b200", "tf32"): 0.025}  # 1,100 for half of FP16's 2,250


def published(device: Device) -> list[tuple[str, str, float, float | None]]:
    """(dense or sparse, number type, what is printed, what SMs and clocks make) of every printed rate."""
    assert device.published is not None
    assert device.rates is not None
    return [
        (part, kind, printed, getattr(getattr(device.rates, part), kind))
        for part in ("dense", "sparse")
        for kind, printed in getattr(device.published, part).known().items()
    ]


@pytest.mark.parametrize("name", GPUS)
def test_every_published_rate_is_sms_times_operations_times_clock(name: str) -> None:
    found = published(GPUS[name])
    assert found
    for part, kind, printed, computed in found:
        assert computed is not None, f"{part} {kind} is published, but the architecture has no rate for it"
        assert computed == pytest.approx(printed, rel=ROUGHER.get((name, kind), ROUNDING)), f"{part} {kind}"


@pytest.mark.parametrize("name", GPUS)
def test_bandwidth_is_bus_times_data_rate(name: str) -> None:
    memory = GPUS[name].memory
    assert memory is not None
    assert memory.bus_bits / 8 * memory.data_rate_mbps / 1e3 == pytest.approx(memory.bandwidth_gb_s, rel=0.005)


@pytest.mark.parametrize("name", GPUS)
def test_published_sparse_rates_are_twice_the_dense_ones(name: str) -> None:
    figures = GPUS[name].published
    assert figures is not None
    dense, sparse = figures.dense.known(), figures.sparse.known()
    for kind in dense.keys() & sparse.keys():
        assert sparse[kind] == pytest.approx(2 * dense[kind], rel=ROUNDING), kind


@pytest.mark.parametrize("name", [name for name, device in DEVICES.items() if device.dla])
def test_dla_rates_are_operations_times_clocks(name: str) -> None:
    dla, dense = DEVICES[name].dla, DEVICES[name].dla_int8_tops
    assert dla is not None
    assert dense is not None
    assert 2 * dense == pytest.approx(dla.published_sparse_int8_tops, rel=0.01)


def test_only_generations_with_2_to_4_have_sparse_rates_and_kernels() -> None:
    for device in GPUS.values():
        assert device.rates is not None
        assert device.compute_capability is not None
        has = float(device.compute_capability) >= 8
        assert bool(device.rates.sparse.known()) == has
        assert (device.sparse is not None) == has


def test_fp8_and_fp4_are_where_the_hardware_has_them() -> None:
    for device in GPUS.values():
        assert device.rates is not None
        capability = float(device.compute_capability or 0)
        assert (device.rates.dense.fp8 is not None) == (capability >= 8.9)
        assert (device.rates.dense.fp4 is not None) == (capability >= 10)
        assert (device.rates.dense.int4 is not None) == (capability in (7.5, 8.0, 8.6, 8.9))


@given(
    st.integers(1, 200),
    st.floats(100, 3000),
    st.sampled_from(NUMBER_TYPES),
    st.integers(64, 32768),
    st.sampled_from([0.5, 1.0]),
)
def test_rates_grow_with_sms_and_clock_and_halve_with_fp32_accumulators(
    sms: int, clock: float, kind: str, operations: int, share: float
) -> None:
    per_clock = Rates(**{kind: operations})

    def rate(sms: int, clock: float) -> float:
        found = peak_rates(per_clock, (kind,), sms=sms, clock_mhz=clock, tensor_clock_mhz=clock, fp32_accumulate=share)
        assert found.dense.known().keys() == found.sparse.known().keys() == {kind}
        assert found.sparse.known()[kind] == 2 * found.dense.known()[kind]
        return found.dense.known()[kind]

    full = sms * operations * clock / 1e6
    assert rate(sms, clock) == pytest.approx(full * share if kind in FP32_ACCUMULATORS else full)
    assert rate(2 * sms, clock) == pytest.approx(2 * rate(sms, clock))
    assert rate(sms, 2 * clock) == pytest.approx(2 * rate(sms, clock))


def test_tensor_cores_have_their_own_clock() -> None:
    found = peak_rates(Rates(fp32=2, fp16=2), (), sms=1, clock_mhz=1000, tensor_clock_mhz=500, fp32_accumulate=1).dense
    assert found.fp32 == pytest.approx(0.002)
    assert found.fp16 == pytest.approx(0.001)
