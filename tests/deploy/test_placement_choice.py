from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.placement_choice import TIE, Trial, choose
from exporters.placement import Placement

PLACEMENTS: tuple[Placement, ...] = ("fp16", "w8a8-linear", "sparse-int8", "w8a8-mha")


def trial(placement: Placement, latency: float, drop: float = 0.0, refused: str = "") -> Trial:
    return Trial(
        placement=placement,
        latency_ms=latency,
        low_ms=0.8 * latency,
        high_ms=1.25 * latency,
        bound_by="launch",
        kernels=9,
        sparse_kernels=0,
        drop=drop,
        refused=refused,
    )


def test_the_fastest_is_taken() -> None:
    choice = choose((trial("fp16", 1.0), trial("w8a8-linear", 0.7, 0.1)), 8, 0.5)
    assert choice is not None
    assert choice.taken == "w8a8-linear"
    assert choice.headline == ("w8a8-linear taken: 0.700 ms predicted at batch 8, 0.10 points lost of 0.5 allowed")


def test_what_loses_more_than_the_target_is_refused_with_the_figure() -> None:
    choice = choose((trial("fp16", 1.0), trial("w8a8-linear", 0.7, 0.6)), 1, 0.5)
    assert choice is not None
    assert choice.taken == "fp16"
    assert [one.refused for one in choice.trials] == ["", "0.60 points lost, 0.5 allowed"]


def test_of_a_tie_the_one_that_changes_fewer_numbers_is_taken() -> None:
    tied, beyond = trial("w8a8-linear", 1.0), trial("w8a8-linear", 0.98)
    for int8, taken in ((tied, "fp16"), (beyond, "w8a8-linear")):
        choice = choose((trial("fp16", 1.005), int8), 1, 0.5)
        assert choice is not None
        assert choice.taken == taken
        assert ("w8a8-linear is within 1 % and changes more numbers" in choice.why) == (taken == "fp16")


def test_none_is_taken_where_all_are_refused() -> None:
    failed = Trial(placement="w8a8-linear", refused="the compiler refused it")
    assert choose((trial("fp16", 1.0, float("inf")), failed), 1, 0.5) is None


def test_the_text_has_a_line_for_each_placement() -> None:
    choice = choose((trial("fp16", 1.0), Trial(placement="w8a8-mha", refused="no such kernel")), 4, 0.5)
    assert choice is not None
    lines = choice.to_text().splitlines()
    assert lines[0] == "at batch 4"
    assert "0.800 to 1.250" in lines[3]
    assert lines[4].split(maxsplit=1) == ["w8a8-mha", "no such kernel"]
    assert lines[5] == choice.headline


@given(
    latencies=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    drops=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    target=st.floats(0, 1),
)
def test_nothing_allowed_is_more_than_the_tie_faster(latencies: list[float], drops: list[float], target: float) -> None:
    trials = tuple(map(trial, PLACEMENTS, latencies, drops))
    choice = choose(trials, 1, target)
    allowed = {one.placement: one.latency_ms or 0.0 for one in trials if one.drop is not None and one.drop <= target}
    if not allowed:
        assert choice is None
        return
    assert choice is not None
    assert allowed[choice.taken] <= (1 + TIE) * min(allowed.values()) * (1 + 1e-12)
    before = [allowed[name] for name in PLACEMENTS[: PLACEMENTS.index(choice.taken)] if name in allowed]
    assert all(latency > (1 + TIE) * min(allowed.values()) for latency in before)


def test_a_trial_survives_json() -> None:
    one = trial("fp16", 1.0, 0.25)
    assert Trial.model_validate_json(one.model_dump_json()) == one
    assert one.drop == pytest.approx(0.25)
