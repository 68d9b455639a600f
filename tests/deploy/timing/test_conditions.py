from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deploy.timing.conditions import Reading, between, parse_stat, read

# The first lines of proc(5)'s example layout; 100 ticks are a second.
STAT = "cpu  10132153 290696 3084719 46828483 16683 0 25195 175628 0 0\ncpu0 1393280 32966 572056 13343292 6130 0\n"
START = Reading(wall_s=0, busy_s=0, stolen_s=0, own_s=0, cores=4, throttled=0, governor="performance")


def test_reads_the_times_of_all_cores() -> None:
    """10132153 + 290696 + 3084719 + 25195 = 13532763 ticks busy, 175628 stolen."""
    assert parse_stat(STAT, 100) == (135327.63, 1756.28)


def test_a_quiet_host_breaks_nothing() -> None:
    found = between(START, replace(START, wall_s=10, busy_s=21, own_s=20))
    assert (found.broken, found.notes) == ((), ())


def test_load_of_others_is_told_from_its_own() -> None:
    found = between(START, replace(START, wall_s=10, busy_s=28, own_s=20))
    assert found.broken == ("other processes used 20 % of the cores",)


def test_theft_and_throttling_break_a_run() -> None:
    found = between(START, replace(START, wall_s=10, stolen_s=0.8, throttled=3))
    assert found.broken == ("the hypervisor took 2.0 % of the time", "the cores were throttled 3 times")


def test_what_the_host_does_not_tell_is_noted() -> None:
    silent = replace(START, throttled=None, governor=None)
    assert len(between(silent, replace(silent, wall_s=1)).notes) == 2
    assert between(START, replace(START, wall_s=1, governor="powersave")).notes == (
        "the CPU's governor is powersave, not performance",
    )


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_load_is_never_negative(busy: float, own: float) -> None:
    assert between(START, replace(START, wall_s=1, busy_s=busy, own_s=own)).load_of_others >= 0


def test_reads_this_host() -> None:
    start, end = read(), read()
    assert end.busy_s >= start.busy_s > 0
    assert end.cores >= 1
